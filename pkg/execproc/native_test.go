package execproc

import (
	"testing"
)

func TestNativeFirst(t *testing.T) {
	r := newRunner(t, func(c *Config) { c.Engine = EngineNative })
	c := newContainer(t)
	p := start(t, r, c, Command{Args: []string{"sh", "-c", "id; echo $HOME; exit 3"}, Stdout: true})
	if !p.Native() {
		t.Error("not native")
	}
	text, code := output(t, r, c, Command{Args: []string{"sh", "-c", "id; echo $HOME; ls -la /proc/self/fd; cat /proc/self/status; exit 3"}})
	t.Log(text, code)
}
