package hostile

import (
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// The attacks work: each of them succeeds with a launcher that makes the mistake it is about, and with one that
// makes none it fails. Without this an attacker that never comes in time would look like a good engine.
func TestAttacksHaveTeeth(t *testing.T) {
	const commands = 40 // at most; one success is enough
	for _, test := range []struct{ attack, capability, mistake, gains string }{
		{"root", "CAP_SYS_PTRACE", "early", "root: the host's file"}, // H1
		{"cwd", "CAP_SYS_PTRACE", "early", "cwd: the host's file"},
		{"ns", "CAP_SYS_PTRACE", "early", "ns: the host's mnt"},
		{"exe", "", "dumpable", "exe:"},
		{"exe-write", "", "dumpable", "exe-write:"}, // CVE-2019-5736
		{"fd", "", "dumpable", "fd: the host's file"},
		{"mem", "", "dumpable", "mem"},
		{"maps", "", "dumpable", "maps"},
		{"environ", "", "dumpable", "environ: the host's"},
		{"auxv", "", "dumpable", "auxv"},
		{"process_vm_readv", "", "dumpable", "process_vm_readv"},
		{"pidfd_getfd", "", "dumpable", "pidfd_getfd: /"},
		{"kcmp", "", "dumpable", "kcmp"},
		{"ptrace", "", "dumpable", "ptrace:"},
		{"plant", "", "dumpable", "plant: a filter"},
		{"plant", "", "believes", "command: other capabilities"}, // C1
		{"together", "", "inheritable", "command: inheritable capabilities"},
		{"together", "", "keeps-environment", "command: something of the host"},
		{"together", "", "descriptor", "command: a descriptor"},
		{"together", "", "dumpable", "fd: the host's file"},
		{"together", "CAP_SYS_PTRACE", "early", "root: the host's file"},
	} {
		t.Run(test.mistake+" "+test.attack, func(t *testing.T) {
			change := func(*specs.Spec) {}
			if test.capability != "" {
				change = withCapability(test.capability)
			}
			c := newContainer(t, change)
			if _, gained := attackUntil(t, test.attack, c, wrong(t, test.mistake), commands, test.gains); !gained {
				t.Errorf("the attack %s gains nothing of a launcher that is wrong: %s", test.attack, test.mistake)
			}
		})
	}
}

// attackUntil attacks one command after the other until something is gained whose description begins so.
func attackUntil(t testing.TB, attack string, c *container, e *entrance, commands int, gains string) (tries int, gained bool) {
	t.Helper()
	for tries = 1; tries <= commands; tries++ {
		r := attackOnce(t, attack, c, c, e, 1)
		for what := range r.gained {
			if strings.HasPrefix(what, gains) {
				return tries, true
			}
		}
	}
	return commands, false
}

// A launcher without a mistake passes: the attackers see mistakes, not launchers.
func TestLauncherWithoutMistake(t *testing.T) {
	for _, configuration := range configurations[:1] {
		c, _ := configuration.containers(t)
		for _, attack := range append([]string{"together"}, active...) {
			r := makeAttack(t, attack, c, c, wrong(t, "none"), 10)
			r.configuration = configuration.name
			judge(t, r)
		}
	}
}
