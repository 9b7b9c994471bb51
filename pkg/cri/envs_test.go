package cri

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// appendEnv adds one KeyValue the way a client with a newer cri-api does.
func appendEnv(request []byte, field protowire.Number, key, value string) []byte {
	var message []byte
	message = protowire.AppendTag(message, keyValueKey, protowire.BytesType)
	message = protowire.AppendString(message, key)
	message = protowire.AppendTag(message, keyValueValue, protowire.BytesType)
	message = protowire.AppendString(message, value)
	request = protowire.AppendTag(slices.Clip(request), field, protowire.BytesType)
	return protowire.AppendBytes(request, message)
}

func marshal(t testing.TB, message proto.Message) []byte {
	t.Helper()
	raw, err := proto.Marshal(message)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestParseEnvs(t *testing.T) {
	plain := marshal(t, &runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"env"}, Stdout: true, Tty: true})
	two := appendEnv(appendEnv(plain, 7, "A", "1"), 7, "B", "$A=x")
	for _, test := range []struct {
		name    string
		request []byte
		want    []string
		err     string
	}{
		{name: "none", request: plain},
		{name: "empty message"},
		{name: "in order, literally", request: two, want: []string{"A=1", "B=$A=x"}},
		{name: "twice", request: appendEnv(two, 7, "A", "2"), want: []string{"A=1", "B=$A=x", "A=2"}},
		{name: "empty value", request: appendEnv(nil, 7, "A", ""), want: []string{"A="}},
		{name: "other field", request: appendEnv(nil, 8, "A", "1")},
		{name: "among other fields", request: append(appendEnv(nil, 7, "A", "1"), plain...), want: []string{"A=1"}},
		{name: "empty name", request: appendEnv(nil, 7, "", "1"), err: "envs[0]: the name is empty"},
		{name: "name with =", request: appendEnv(two, 7, "A=B", "1"), err: `envs[2]: "A=B" is not a name`},
		{name: "value with NUL", request: appendEnv(nil, 7, "A", "x\x00y"), err: "NUL"},
		{name: "cut short", request: two[:len(two)-1], err: "malformed"},
		{name: "malformed entry", request: protowire.AppendBytes(protowire.AppendTag(nil, 7, protowire.BytesType), []byte{0x0a, 5, 'x'}), err: "malformed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := parseEnvs(test.request, execRequestEnvs)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Fatalf("got %v, want %q", err, test.err)
				}
				return
			}
			if err != nil || !slices.Equal(got, test.want) {
				t.Errorf("got %q, %v, want %q", got, err, test.want)
			}
		})
	}
}

func FuzzParseEnvs(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(appendEnv(nil, 7, "A", "1"))
	f.Add(appendEnv(appendEnv([]byte{0x18, 1}, 7, "A", ""), 4, "B", "2"))
	f.Add([]byte{0x3a, 0xff, 0xff, 0xff, 0xff, 0x0f})
	f.Fuzz(func(t *testing.T, request []byte) {
		envs, err := parseEnvs(request, execRequestEnvs)
		if err != nil {
			return
		}
		for _, env := range envs {
			name, _, ok := strings.Cut(env, "=")
			if !ok || name == "" || strings.ContainsRune(env, 0) {
				t.Errorf("%q is no environment variable", env)
			}
		}
	})
}

func FuzzParseVerboseInfo(f *testing.F) {
	f.Add(testdata(f, "containerd-container.json"))
	f.Add(testdata(f, "containerd-sandbox.json"))
	f.Add(testdata(f, "crio-container.json"))
	f.Add(testdata(f, "crio-sandbox.json"))
	f.Add(`{"runtimeSpec":null,"runtimeOptions":[],"pid":-1}`)
	f.Fuzz(func(t *testing.T, text string) {
		info := map[string]string{infoKey: text}
		if container, err := parseContainerInfo(info); err == nil {
			container.RuntimeSpec.networkNamespace()
			r := &resolver{lookPath: func(string) (string, error) { return "/bin/runc", nil }}
			if runtime, err := r.containerdRuntime(container); err == nil && runtime.binary != "" && runtime.root == "" {
				t.Errorf("a runtime without a root: %+v", runtime)
			}
		}
		if sandbox, err := parseSandboxInfo(info); err == nil {
			sandbox.RuntimeSpec.networkNamespace()
		}
	})
}

func FuzzParseCrioConfig(f *testing.F) {
	f.Add(testdata(f, "crio-status-config.json"))
	f.Add(testdata(f, "crio.conf"))
	f.Fuzz(func(_ *testing.T, text string) {
		_, _ = parseCrioStatusConfig(text)
		_, _ = parseCrioTOMLConfig([]byte(text))
	})
}
