// Package packaging tests the .deb, the .rpm and the systemd unit: what they hold, where it lands, and
// that what has landed works.
package packaging

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
)

const top = "../.."

// files is what is installed, with its mode.
var files = map[string]fs.FileMode{
	"usr/bin/streamshim":                                  0o755,
	"usr/lib/systemd/system/streamshim.service":           0o644,
	"etc/streamshim/config.toml":                          0o644,
	"usr/share/man/man8/streamshim.8.gz":                  0o644,
	"usr/share/man/man8/streamshim-serve.8.gz":            0o644,
	"usr/share/bash-completion/completions/streamshim":    0o644,
	"usr/share/zsh/vendor-completions/_streamshim":        0o644,
	"usr/share/fish/vendor_completions.d/streamshim.fish": 0o644,
	"usr/share/streamshim/grafana/streamshim.json":        0o644,
	"usr/share/man/man5/streamshim-config.5.gz":           0o644,
	"usr/share/doc/streamshim/docs/install.md":            0o644,
	"usr/share/doc/streamshim/CHANGELOG.md":               0o644,
	"usr/share/doc/streamshim/copyright":                  0o644,
	"usr/share/doc/streamshim/ui/NOTICE":                  0o644,
	"usr/share/doc/streamshim/ui/vendor/xterm.LICENSE":    0o644,
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// need skips the test, or fails it where everything is required, if a program is missing.
func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, program := range programs {
		if _, err := exec.LookPath(program); err != nil {
			if os.Getenv("STREAMSHIM_REAL") == "required" {
				t.Fatal(err)
			}
			t.Skip(err)
		}
	}
}

// build makes all packages in a folder of its own.
func build(t *testing.T) (dir string) {
	t.Helper()
	need(t, "make", "go", "git")
	dir = t.TempDir()
	run(t, "make", "-C", top, "release", "RELEASE=devel", "PACKAGES_DIR="+dir)
	return dir
}

// one returns the only file in dir that the pattern names.
func one(t *testing.T, dir, pattern string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(found) != 1 {
		t.Fatalf("%s: %v %v", pattern, found, err)
	}
	return found[0]
}

func TestPackages(t *testing.T) {
	need(t, "dpkg", "dpkg-deb")
	dir := build(t)
	deb := one(t, dir, "*_"+runtime.GOARCH+".deb")

	t.Run("deb", func(t *testing.T) {
		root := t.TempDir()
		run(t, "dpkg-deb", "-x", deb, root)
		expectFiles(t, root)
		expectLinks(t, filepath.Join(root, "usr/share/doc/streamshim"))
		for line := range strings.Lines(run(t, "dpkg-deb", "-c", deb)) {
			if !strings.Contains(line, " root/root ") {
				t.Errorf("not root's: %s", line)
			}
		}
		control := t.TempDir()
		run(t, "dpkg-deb", "-e", deb, control)
		conffiles, err := os.ReadFile(filepath.Join(control, "conffiles"))
		if err != nil || strings.TrimSpace(string(conffiles)) != "/etc/streamshim/config.toml" {
			t.Errorf("conffiles: %q %v", conffiles, err)
		}
	})

	// As apt would, into a root of its own, and out again.
	t.Run("install and remove", func(t *testing.T) {
		if os.Geteuid() != 0 {
			t.Skip("dpkg needs root")
		}
		root := t.TempDir()
		for _, dir := range []string{"var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/dpkg/triggers"} {
			if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(root, "var/lib/dpkg/status"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		dpkg := []string{"--root=" + root, "--force-script-chrootless", "--log=" + filepath.Join(root, "dpkg.log")}
		run(t, "dpkg", append(dpkg, "--install", deb)...)
		expectFiles(t, root)
		expectWorks(t, root)

		config := filepath.Join(root, "etc/streamshim/config.toml")
		if err := os.WriteFile(config, []byte("log_level = \"warn\"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		run(t, "dpkg", append(dpkg, "--install", deb)...)
		if text, err := os.ReadFile(config); err != nil || !strings.Contains(string(text), "warn") {
			t.Errorf("an upgrade has overwritten the configuration: %q %v", text, err)
		}
		run(t, "dpkg", append(dpkg, "--remove", "streamshim")...)
		if _, err := os.Stat(filepath.Join(root, "usr/bin/streamshim")); !os.IsNotExist(err) {
			t.Errorf("after the removal: %v", err)
		}
		// As postremove.sh says.
		records := filepath.Join(root, "var/log/streamshim/audit.log")
		if err := os.MkdirAll(filepath.Dir(records), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(records, []byte("{}\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(config); err != nil {
			t.Errorf("the configuration after the removal: %v", err)
		}
		if err := os.MkdirAll(filepath.Join(root, "run/streamshim/processes"), 0o755); err != nil {
			t.Fatal(err)
		}
		run(t, "dpkg", append(dpkg, "--purge", "streamshim")...)
		if _, err := os.Stat(config); !os.IsNotExist(err) {
			t.Errorf("the configuration after the purge: %v", err)
		}
		if _, err := os.Stat(records); err != nil {
			t.Errorf("the audit log after the purge: %v", err)
		}

		// Without records nothing is left.
		if err := os.Remove(records); err != nil {
			t.Fatal(err)
		}
		run(t, "dpkg", append(dpkg, "--install", deb)...)
		run(t, "dpkg", append(dpkg, "--purge", "streamshim")...)
		if left := run(t, "find", root, "-iname", "*streamshim*"); left != "" {
			t.Errorf("after the purge: %s", left)
		}
	})

	t.Run("rpm", func(t *testing.T) {
		text, err := os.ReadFile(one(t, dir, "*.x86_64.rpm"))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.HasPrefix(text, []byte("\xed\xab\xee\xdb")) { // the lead's magic number
			t.Fatalf("no RPM: %x", text[:8])
		}
		// The header's tags BASENAMES and DIRNAMES are plain text.
		for _, name := range []string{"streamshim.service", "config.toml", "/usr/lib/systemd/system/", "/usr/share/zsh/site-functions/", "streamshim.8.gz"} {
			if !bytes.Contains(text, []byte(name+"\x00")) {
				t.Errorf("the RPM's header does not name %s", name)
			}
		}
	})

	for arch, machine := range map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64} {
		t.Run(arch, func(t *testing.T) {
			deb := one(t, dir, "*_"+arch+".deb")
			if got := strings.TrimSpace(run(t, "dpkg-deb", "-f", deb, "Architecture")); got != arch {
				t.Errorf("the package is for %q", got)
			}
			root := t.TempDir()
			run(t, "dpkg-deb", "-x", deb, root)
			program := filepath.Join(root, "usr/bin/streamshim")
			file, err := elf.Open(program)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			if file.Machine != machine {
				t.Errorf("the program is for %v", file.Machine)
			}
			expectBill(t, one(t, dir, "*_"+arch+".cdx.json"), program)
			unpacked := t.TempDir()
			archive := one(t, dir, "*-linux-"+arch+".tar.gz")
			run(t, "tar", "-xzf", archive, "-C", unpacked)
			folder := filepath.Join(unpacked, strings.TrimSuffix(filepath.Base(archive), ".tar.gz"))
			expectLinks(t, folder)
			for _, pair := range [][2]string{{"streamshim", program}, {"config.toml", filepath.Join(root, "etc/streamshim/config.toml")}} {
				one, err := os.ReadFile(filepath.Join(folder, pair[0]))
				other, err2 := os.ReadFile(pair[1])
				if err := errors.Join(err, err2); err != nil || !bytes.Equal(one, other) {
					t.Errorf("%s of the archive is not the package's: %v", pair[0], err)
				}
			}
		})
	}

	t.Run("notes", func(t *testing.T) {
		text, err := os.ReadFile(filepath.Join(dir, "NOTES.md"))
		if err != nil || !strings.HasPrefix(string(text), "# streamshim devel\n") || !strings.Contains(string(text), "### ") {
			t.Errorf("%v: %.300s", err, text)
		}
	})

	t.Run("checksums", func(t *testing.T) {
		sums, err := os.ReadFile(filepath.Join(dir, "SHA256SUMS"))
		if err != nil {
			t.Fatal(err)
		}
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := bytes.Count(sums, []byte("\n")), len(entries)-1; got != want || want != 9 {
			t.Errorf("%d sums of %d files, expected 9:\n%s", got, want, sums)
		}
		check := exec.Command("sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS")
		check.Dir = dir
		if out, err := check.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})

	t.Run("reproducible", func(t *testing.T) { expectReproducible(t, dir) })
}

// expectBill compares the bill of materials with what the program says of itself.
func expectBill(t *testing.T, path, program string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var bill struct {
		BomFormat string
		Metadata  struct {
			Component  struct{ Version string }
			Properties []struct{ Name, Value string }
		}
		Components []struct{ Name, Version string }
	}
	if err := json.Unmarshal(text, &bill); err != nil {
		t.Fatal(err)
	}
	if version := bill.Metadata.Component.Version; bill.BomFormat != "CycloneDX" || !strings.Contains(filepath.Base(path), "_"+version+"_") {
		t.Errorf("format %q, version %q", bill.BomFormat, version)
	}
	content, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	sum := fmt.Sprintf("%x", sha256.Sum256(content))
	if !slices.ContainsFunc(bill.Metadata.Properties, func(p struct{ Name, Value string }) bool { return p.Value == sum }) {
		t.Errorf("it is of another program, %+v, not of %s", bill.Metadata.Properties, sum)
	}
	listed := map[string]string{}
	for _, component := range bill.Components {
		listed[component.Name] = component.Version
	}
	for _, library := range []string{"@xterm/xterm", "asciinema-player", "avt"} {
		if listed[library] == "" {
			t.Errorf("it does not list %s, which is in the page", library)
		}
	}
	info, err := buildinfo.ReadFile(program)
	if err != nil || len(info.Deps) < 10 {
		t.Fatalf("%v %v", info, err)
	}
	for _, dependency := range info.Deps {
		if listed[dependency.Path] != dependency.Version {
			t.Errorf("it lists %s %q, the program has %q", dependency.Path, listed[dependency.Path], dependency.Version)
		}
	}
	if listed["std"] != info.GoVersion {
		t.Errorf("it lists Go %q, the program has %q", listed["std"], info.GoVersion)
	}
}

// expectReproducible builds the packages again from a copy of the tree: in another folder, with other times, other
// modes, another time zone and another host name.
func expectReproducible(t *testing.T, dir string) {
	t.Helper()
	copied, second := t.TempDir(), t.TempDir()
	// --touch: with the times of now. bin has the programs that make packages, which need not be built again.
	run(t, "bash", "-euo", "pipefail", "-c", "cd "+top+` && { git ls-files -z --cached --others --exclude-standard; printf 'bin/nfpm\0bin/cyclonedx-gomod\0'; } |
		while IFS= read -r -d "" name; do [ ! -e "$name" ] || printf '%s\0' "$name"; done |
		tar --null --no-recursion -T - -c | tar -x --touch --no-same-permissions -C "$1"`, "bash", copied)
	elsewhere := []string{"sh", "-ec", `umask 077; chmod -R go-rwx .; touch bin/*; exec make release RELEASE=devel "PACKAGES_DIR=$1"`, "sh", second}
	if os.Geteuid() == 0 { // on a machine with another name
		elsewhere = append([]string{"unshare", "--uts", "sh", "-c", `hostname elsewhere; exec "$@"`, "sh"}, elsewhere...)
	}
	again := exec.Command(elsewhere[0], elsewhere[1:]...)
	again.Dir = copied
	again.Env = append(os.Environ(), "TZ=Pacific/Kiritimati", "LC_ALL=C", "GIT_OPTIONAL_LOCKS=0",
		"GIT_DIR="+strings.TrimSpace(run(t, "git", "-C", top, "rev-parse", "--absolute-git-dir")), "GIT_WORK_TREE="+copied)
	if out, err := again.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		first, err := os.ReadFile(filepath.Join(dir, entry.Name()))
		if err != nil {
			t.Fatal(err)
		}
		other, err := os.ReadFile(filepath.Join(second, entry.Name()))
		if err != nil || !bytes.Equal(first, other) {
			t.Errorf("%s is another one when it is built again (%v)", entry.Name(), err)
		}
	}
}

func expectFiles(t *testing.T, root string) {
	t.Helper()
	for name, mode := range files {
		info, err := os.Stat(filepath.Join(root, name))
		if err != nil {
			t.Error(err)
		} else if info.Mode() != mode {
			t.Errorf("%s has mode %v, expected %v", name, info.Mode(), mode)
		}
	}
}

var link = regexp.MustCompile(`\]\(([^)#:]+)[)#]`)

// expectLinks follows the links of all documents to files beside them.
func expectLinks(t *testing.T, root string) {
	t.Helper()
	links := 0
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".md") {
			return err
		}
		text, err := os.ReadFile(path)
		for _, match := range link.FindAllStringSubmatch(string(text), -1) {
			links++
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), match[1])); err != nil {
				t.Errorf("%s links to %s, which was not installed", path, match[1])
			}
		}
		return err
	})
	if err != nil || links < 20 {
		t.Errorf("%d links, %v", links, err)
	}
}

// expectWorks runs the installed program with the installed configuration.
func expectWorks(t *testing.T, root string) {
	t.Helper()
	binary, config := filepath.Join(root, "usr/bin/streamshim"), filepath.Join(root, "etc/streamshim/config.toml")
	if out := run(t, binary, "version"); !strings.HasPrefix(out, "streamshim ") {
		t.Errorf("version: %s", out)
	}
	out, err := exec.Command(binary, "check", "--config", config, "--upstream", "unix://"+filepath.Join(root, "no.sock"),
		"--listen", "unix://"+filepath.Join(root, "s.sock"), "--state-dir", root).CombinedOutput()
	if err == nil {
		t.Error("check is content without a runtime")
	}
	for _, want := range []string{"ok ", "failed ", "pidfd", "there is no socket", "no.sock", "-> start the runtime"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("check does not say %q:\n%s", want, out)
		}
	}
}

// The scripts leave the kubelet alone and are POSIX.
func TestScripts(t *testing.T) {
	need(t, "dash")
	scripts, err := filepath.Glob(filepath.Join(top, "deploy/package/p*.sh"))
	if err != nil || len(scripts) != 3 {
		t.Fatal(scripts, err)
	}
	touches := regexp.MustCompile(`systemctl[^"\n]*kubelet`)
	for _, script := range scripts {
		run(t, "dash", "-n", script)
		text, err := os.ReadFile(script)
		if err != nil {
			t.Fatal(err)
		}
		if found := touches.Find(text); found != nil {
			t.Errorf("%s: %s", script, found)
		}
	}
	if !touches.MatchString("systemctl restart kubelet") {
		t.Error("this test would not see it")
	}
}

// As long as the kubelet talks to streamshim the package stays, wherever the kubelet has its endpoint
// from.
func TestRemovalIsRefused(t *testing.T) {
	need(t, "dash", "grep", "tr")
	script, err := os.ReadFile(filepath.Join(top, "deploy/package/preremove.sh"))
	if err != nil {
		t.Fatal(err)
	}
	const ours, other = "unix:///run/streamshim/streamshim.sock", "unix:///run/crio/crio.sock"
	for name, test := range map[string]struct {
		files  map[string]string
		refuse string
	}{
		"no kubelet": {},
		"not ours": {files: map[string]string{
			"kubelet/config.yaml":       "containerRuntimeEndpoint: " + other + "\n",
			"kubelet/kubeadm-flags.env": `KUBELET_KUBEADM_ARGS="--container-runtime-endpoint=` + other + `"`,
			"proc/7/comm":               "kubelet\n", "proc/7/cmdline": "kubelet\x00--container-runtime-endpoint=" + other + "\x00",
		}},
		"configuration": {map[string]string{"kubelet/config.yaml": "a: b\ncontainerRuntimeEndpoint: " + ours + "\n"}, "config.yaml"},
		"as JSON":       {map[string]string{"kubelet/config.yaml": "{\n  \"containerRuntimeEndpoint\": \"" + ours + "\"}"}, "config.yaml"},
		"kubeadm":       {map[string]string{"kubelet/kubeadm-flags.env": `A="--v=2 --container-runtime-endpoint=` + ours + `"`}, "kubeadm-flags.env"},
		"drop-in": {map[string]string{
			"proc/8/comm": "kubelet\n", "proc/8/cmdline": "kubelet\x00--container-runtime-endpoint\x00" + ours + "\x00",
		}, "drop-in"},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			for path, text := range test.files {
				path = filepath.Join(root, path)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			moved := strings.NewReplacer("/run/systemd/system", root, "/var/lib/kubelet", filepath.Join(root, "kubelet"),
				"/proc/", filepath.Join(root, "proc")+"/", "systemctl disable", "echo disable").Replace(string(script))
			out, err := exec.Command("dash", "-c", moved, "preremove.sh", "remove").CombinedOutput()
			if (err != nil) != (test.refuse != "") || !strings.Contains(string(out), test.refuse) {
				t.Errorf("%v: %s", err, out)
			}
			if strings.Contains(string(out), "disable --now") != (test.refuse == "") {
				t.Errorf("the service: %s", out)
			}
		})
	}
}

// inherited are settings that runc and the commands in containers would inherit, or that would hide
// the containers' file systems or stop port-forwards. docs/security.md has a reason for each.
var inherited = []string{
	"ProtectHome", "PrivateTmp", "PrivateDevices", "PrivateMounts", "PrivateNetwork", "PrivateUsers", "PrivateIPC",
	"InaccessiblePaths", "TemporaryFileSystem", "MountFlags", "RootDirectory",
	"ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs", "ProtectControlGroups", "ProtectProc", "ProcSubset",
	"ProtectHostname", "ProtectClock", "NoNewPrivileges", "RestrictNamespaces", "RestrictSUIDSGID", "RestrictAddressFamilies",
	"RestrictRealtime", "RestrictFileSystems", "LockPersonality", "MemoryDenyWriteExecute", "SystemCallFilter",
	"SystemCallArchitectures", "CapabilityBoundingSet", "AmbientCapabilities", "DynamicUser", "User", "IPAddressDeny",
}

func TestUnit(t *testing.T) {
	path := filepath.Join(top, "deploy/systemd/streamshim.service")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	settings := map[string]string{}
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(name, "#") {
			settings[name] = value
		}
	}
	for name := range settings {
		if slices.Contains(inherited, name) {
			t.Errorf("%s would be inherited by commands in containers or hide their file systems", name)
		}
	}
	for name, want := range map[string]string{
		"KillMode": "process", "Type": "notify", "Restart": "always", "RestartSec": "100ms", "UMask": "0022", "ExecReload": "/bin/kill -HUP $MAINPID",
		"Before": "kubelet.service", "RuntimeDirectoryPreserve": "yes",
		// What these do to commands: TestSettingsDoNotReachCommands.
		"ProtectSystem": "strict", "ReadWritePaths": "-/run -/tmp", "DevicePolicy": "closed",
	} {
		if settings[name] != want {
			t.Errorf("%s is %q, expected %q", name, settings[name], want)
		}
	}
	if !strings.Contains(settings["After"], "containerd.service") {
		t.Errorf("After=%s", settings["After"])
	}

	// systemd's own opinion, with a program in place of the one that is not installed here.
	need(t, "systemd-analyze")
	verified := strings.NewReplacer("/usr/bin/streamshim", "/bin/true", "man:streamshim(8) ", "").Replace(string(text))
	copied := filepath.Join(t.TempDir(), "streamshim.service")
	if err := os.WriteFile(copied, []byte(verified), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("systemd-analyze", "verify", "--recursive-errors=no", copied).CombinedOutput()
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "streamshim.service") {
			t.Error(line)
		}
	}
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// The node keeps the runtime it has: apt would install what is recommended.
func TestNothingElseIsInstalled(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(top, "deploy/package/nfpm.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if found := regexp.MustCompile(`(?m)^(recommends|depends):`).FindString(string(text)); found != "" {
		t.Errorf("the package %s something", found)
	}
}

// A release is of a tag, with its notes, into an empty folder, or it is none.
func TestNoReleaseOfAnything(t *testing.T) {
	need(t, "bash", "git", "awk")
	script, err := filepath.Abs(filepath.Join(top, "deploy/release.sh"))
	if err != nil {
		t.Fatal(err)
	}
	tree := t.TempDir()
	run(t, "git", "init", "-q", tree)
	if err := os.Mkdir(filepath.Join(tree, "deploy"), 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(tree, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(script)
	if err != nil {
		t.Fatal(err)
	}
	write("deploy/release.sh", string(text))
	write("CHANGELOG.md", "# Changelog\n\n## 1.0.0\n\n- all\n")
	run(t, "git", "-C", tree, "add", "-A")
	run(t, "git", "-C", tree, "-c", "user.name=t", "-c", "user.email=t", "commit", "-qm", "x")
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "old.deb"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct{ version, out, says string }{
		"no tag":    {"", t.TempDir(), "no tag"},
		"no notes":  {"v2.0.0", t.TempDir(), "no section"},
		"not empty": {"v1.0.0", full, "not empty"},
		"changes":   {"v1.0.0", t.TempDir(), "not committed"},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "changes" {
				write("changed", "")
				defer os.Remove(filepath.Join(tree, "changed"))
			}
			out, err := exec.Command("bash", filepath.Join(tree, "deploy/release.sh"), test.version, test.out).CombinedOutput()
			if err == nil || !strings.Contains(string(out), test.says) {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}
