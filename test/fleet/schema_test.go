package fleet

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// operator is the release of the Prometheus operator whose PodMonitor the chart is checked against.
const operator = "github.com/prometheus-operator/prometheus-operator@v0.83.0"

func podMonitorCRD(t *testing.T) string {
	t.Helper()
	var module struct{ Dir string }
	if err := json.Unmarshal([]byte(run(t, "", "go", "mod", "download", "-json", operator)), &module); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(module.Dir, "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// conforms checks manifests by kubeconform, against the schemas of the API server that runs, unknown fields
// refused, and by the API server itself.
func conforms(t *testing.T, f *fleet, manifests string) {
	t.Helper()
	text, err := f.Get(t.Context(), "/openapi/v2")
	if err != nil {
		t.Fatal(err)
	}
	var api struct{ Definitions map[string]map[string]any }
	if err := json.Unmarshal(text, &api); err != nil {
		t.Fatal(err)
	}
	kinds := map[string]string{} // file name: definition
	for name, definition := range api.Definitions {
		if _, ok := definition["properties"]; ok && definition["additionalProperties"] == nil {
			definition["additionalProperties"] = false
		}
		groupVersionKinds, _ := definition["x-kubernetes-group-version-kind"].([]any)
		for _, each := range groupVersionKinds {
			k, _ := each.(map[string]any)
			group, _, _ := strings.Cut(fmt.Sprint(k["group"]), ".")
			file := strings.ToLower(fmt.Sprintf("%s-%s-%s.json", k["kind"], group, k["version"]))
			kinds[strings.ReplaceAll(file, "--", "-")] = name
		}
	}
	// Written as a string, a number is one too (OpenAPI 2 cannot say so).
	api.Definitions["io.k8s.apimachinery.pkg.util.intstr.IntOrString"] = map[string]any{"type": []string{"string", "integer"}}
	dir := t.TempDir()
	for document := range strings.SplitSeq(manifests, "\n---\n") {
		var object struct{ APIVersion, Kind string }
		if err := yaml.Unmarshal([]byte(document), &object); err != nil {
			t.Fatal(err)
		}
		if object.Kind == "" {
			continue
		}
		group, version, found := strings.Cut(object.APIVersion, "/")
		file := strings.ToLower(object.Kind + "-" + object.APIVersion + ".json")
		if found {
			group, _, _ = strings.Cut(group, ".")
			file = strings.ToLower(object.Kind + "-" + group + "-" + version + ".json")
		}
		schema, err := json.Marshal(map[string]any{"$ref": "#/definitions/" + kinds[file], "definitions": api.Definitions})
		if err != nil || kinds[file] == "" {
			t.Fatalf("no schema %s: %v", file, err)
		}
		if err := os.WriteFile(filepath.Join(dir, file), schema, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	kubeconform := []string{"-strict", "-summary", "-schema-location", dir + "/{{ .ResourceKind }}{{ .KindSuffix }}.json"}
	t.Log(run(t, manifests, top+"/bin/kubeconform", kubeconform...))
	if out, err := runFails(strings.Replace(manifests, "hostPID: true", "hostPid: true", 1), top+"/bin/kubeconform", kubeconform...); err == nil {
		t.Errorf("kubeconform takes a field that does not exist:\n%s", out)
	}
	// A namespace that a dry run has not made would refuse the rest; the chart takes it over.
	f.kubectl("", "create", "namespace", namespace)
	f.kubectl(manifests, "apply", "--dry-run=server", "--validate=strict", "-f", "-")
}

func runFails(stdin, name string, args ...string) (string, error) {
	command := exec.Command(name, args...)
	command.Stdin = strings.NewReader(stdin)
	out, err := command.CombinedOutput()
	return string(out), err
}
