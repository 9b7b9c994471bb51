// Package ui tests the page of "streamshim ui" in a real browser, with real sessions in front of a real containerd.
// "make ui-test" runs it, and leaves pictures in .artefacts/ui to be looked at.
package ui

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

func TestMain(m *testing.M) {
	if os.Getenv("STREAMSHIM_UI") == "" {
		fmt.Println("STREAMSHIM_UI is not set; make ui-test sets it")
		return
	}
	os.Exit(harness.Main(m, "ui"))
}

const configuration = `
metrics_address = %q

[audit]
command = "full"

[recording]
directory = %q

[[recording.rule]]
namespaces = ["shop"]
`

// fixture is a node with sessions, and the page of it in a browser.
type fixture struct {
	*page
	shim       *harness.Streamshim
	containers map[string]string // by pod
	stopPage   func()
}

// terminal is a session with a terminal, and its user.
type terminal struct {
	t     *testing.T
	typed io.Writer
	shown *testutil.Buffer
	ended <-chan error
	leave func()
}

func (f *fixture) begin(t *testing.T, pod, transport string, args ...string) *terminal {
	t.Helper()
	input, typed := io.Pipe()
	t.Cleanup(func() { typed.Close() })
	s := &terminal{t: t, typed: typed, shown: &testutil.Buffer{}}
	options := remotecommand.StreamOptions{Stdin: input, Stdout: s.shown, Tty: true, TerminalSizeQueue: sizes()}
	s.ended, s.leave = harness.Begin(t, transport, f.shim.ExecURL(t, f.containers[pod], options, args...), options)
	t.Cleanup(s.leave)
	return s
}

func sizes() remotecommand.TerminalSizeQueue {
	q := make(harness.Sizes, 1)
	q <- remotecommand.TerminalSize{Width: 100, Height: 30}
	return q
}

// say types a line that prints a word which is not in the line itself, and waits for it.
func (s *terminal) say(word string) {
	s.t.Helper()
	half := len(word) / 2
	fmt.Fprintf(s.typed, "echo %s''%s\n", word[:half], word[half:])
	testutil.Eventually(s.t, "the terminal shows "+word, func() bool { return strings.Contains(s.shown.String(), word) })
}

func start(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{containers: make(map[string]string)}
	metrics := harness.UnusedAddress(t)
	f.shim = harness.StartInstalled(t, fmt.Sprintf(configuration, metrics, filepath.Join(t.TempDir(), "recordings")), node.Binary(t))
	for _, spec := range []node.PodSpec{
		{Name: "web-7f9c6d5b8-x2x4k", Namespace: "shop"}, {Name: "ledger-0", Namespace: "bank"},
	} {
		pod, err := harness.Shared.Node.RunPod(t.Context(), spec)
		if err != nil {
			t.Fatal(err)
		}
		f.containers[spec.Namespace] = harness.RunContainerIn(t, pod, node.ContainerSpec{Name: "app"})
	}
	address, stop := startPage(t, node.Binary(t), "--admin", "unix://"+filepath.Join(f.shim.Folder, "admin.sock"), "--metrics-address", metrics)
	f.stopPage = stop
	b := startBrowser(t)
	plain, _, _ := strings.Cut(address, "#")
	f.page = b.open(plain)
	f.await("who has no token is told so", `document.body.innerText.includes("Not signed in.")`)
	f.shots("stranger")
	// In the same tab, where only what follows # is another: the browser loads nothing by itself.
	f.do("Page.navigate", object{"url": address})
	f.await("the page is live", live)
	if at := fmt.Sprint(f.eval(`location.href`)); at != plain {
		t.Errorf("the token stays in the address: %s", at)
	}
	f.do("Page.navigate", object{"url": plain})
	f.await("it is live when it is loaded again", live)
	second := b.open(address)
	second.await("the token is good for one browser", `document.body.innerText.includes("Not signed in.")`)
	b.takeFaults() // 401
	return f
}

// awaitRows waits until there are so many sessions on the page.
func (f *fixture) awaitRows(n int) {
	f.t.Helper()
	f.await(fmt.Sprintf("%d sessions are on the page", n), fmt.Sprintf(`document.getElementById("sessions").children.length === %d`, n))
}

// quiet fails the test if the browser had something to complain of.
func (f *fixture) quiet() {
	f.t.Helper()
	for _, fault := range f.takeFaults() {
		f.t.Errorf("the browser says: %.600s", fault)
	}
}

// live tells whether the page has what streamshim says.
const live = `document.readyState === "complete" && document.getElementById("status").textContent === "live"`

// screen is what the terminal on the page shows.
const screen = `[...document.querySelectorAll("#terminal .xterm-rows > div")].map((row) => row.textContent).join("\n")`

func TestPage(t *testing.T) {
	f := start(t)
	f.await("an empty page says so", `document.getElementById("none").innerText === "Nobody is in a pod of this node." && document.getElementById("no-recordings").innerText.startsWith("No recordings.")`)
	f.shots("empty")

	// One after the other, so that the list has this order.
	shop := f.begin(t, "shop", "SPDY", "sh")
	f.awaitRows(1)
	bank := f.begin(t, "bank", "WebSocket", "sh")
	f.awaitRows(2)
	// A name that would be a program of the page, and one that turns text around.
	evil := f.begin(t, "bank", "SPDY", "sh", "-c", "cat", "<img src=x onerror=alert(1)>", "\u202egpj.exe")
	f.awaitRows(3)
	if n := f.eval(`document.querySelectorAll("tbody img").length`); n != 0.0 {
		t.Errorf("%v elements came from a command line", n)
	}
	f.await("it is text", `document.getElementById("sessions").innerText.includes("<img src=x onerror=alert(1)> \\u202egpj.exe")`)
	f.await("figures come from the metrics", `document.querySelector("#figure-memory b").textContent.includes("MiB") && document.querySelector("#figure-cpu b").textContent.includes("%")`)

	t.Log("filters")
	f.eval(`(() => { const s = document.getElementById("namespace"); s.value = "bank"; s.dispatchEvent(new Event("change")); })()`)
	f.awaitRows(2)
	f.await("the count says what is hidden", `document.getElementById("count").textContent === "2 of 3"`)
	f.press("/")
	for _, c := range "nobody" {
		f.press(string(c))
	}
	f.await("a filter that nothing matches says so", `document.getElementById("none").innerText === "Nothing matches the filters."`)
	f.eval(`for (const id of ["namespace", "pod"]) { const e = document.getElementById(id); e.value = ""; e.dispatchEvent(new Event(e.tagName === "INPUT" ? "input" : "change")); }`)
	f.press("Escape")
	f.awaitRows(3)

	t.Log("keyboard")
	f.await("all can be watched, since their processes run", `[...document.querySelectorAll("[data-act=Watch]")].every((b) => !b.disabled)`)
	seen := f.walk()
	for _, want := range []string{"namespace", "pod", "Watch", "End"} {
		if !slices.ContainsFunc(seen, func(s string) bool { return strings.HasPrefix(s, want) }) {
			t.Errorf("Tab does not come to %s: %q", want, seen)
		}
	}
	f.eval(`document.activeElement.blur()`)
	f.press("j")
	first := f.focused()
	f.press("j")
	if second := f.focused(); second == first || second == "BODY" {
		t.Errorf("j goes from %s to %s", first, second)
	}
	f.press("k")
	if f.focused() != first {
		t.Errorf("k does not come back to %s", first)
	}
	shop.say("before")
	f.shots("sessions")
	// A second of polling must neither move anything nor take the focus.
	f.eval(`window.shifts = 0; new Promise((passed) => setTimeout(passed, 2500))`)
	// A number on the right that becomes a digit longer is 0.0005 or so; a row that moves the next one, 0.01 and more.
	if shifts := f.eval(`window.shifts`); shifts.(float64) > 0.005 {
		t.Errorf("the layout shifts by %v", shifts)
	}
	if f.focused() != first {
		t.Errorf("the focus has gone to %s", f.focused())
	}
	f.quiet()

	t.Log("watch, through a hand-over")
	f.press("Enter")
	f.await("the watch has begun", `document.getElementById("screen").open && document.getElementById("screen-note").textContent.startsWith("Read-only")`)
	shop.say("watched")
	f.await("the page shows the terminal", screen+`.includes("watched")`)
	fmt.Fprint(shop.typed, `printf '\033]8;;javascript:alert(2)\007li''nk\033]8;;\007 <b>bo''ld</b> \033[1;32mgreen\033[0m\n'; ls -la /; ls /bin | head -40 | tr '\n' ' '`+"\n")
	f.await("text is text", screen+`.includes("<b>bold</b>")`)
	f.shots("watch")
	// Done as often as they say, these would take minutes.
	fmt.Fprint(shop.typed, `for c in I L M S T Z b; do printf "x\033[2147483647$c"; done; printf 'rep\033[3b\033[2S al''ive\n'`+"\n")
	f.await("the page is not held up", `(() => { const shown = `+screen+`; return shown.includes("repppp") && shown.includes("alive"); })()`)
	f.look(400, false)
	f.await("a terminal wider than the window can be scrolled", `(() => { const e = document.getElementById("terminal"); return e.scrollWidth > e.clientWidth && e.scrollHeight <= e.clientHeight; })()`)
	f.look(1600, false)
	if out, err := f.shim.Upgrade(t); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	f.await("the watch goes on", `document.getElementById("screen-note").textContent.startsWith("Read-only")`)
	// What is shown between two watches is not seen, so it is said again.
	testutil.Eventually(t, "the terminal is seen after the hand-over", func() bool {
		shop.say("afterwards")
		return f.eval(screen+`.includes("afterwards")`) == true
	})
	f.press("Escape")
	f.await("Esc closes it", `!document.getElementById("screen").open`)
	f.await("the list goes on", `document.getElementById("status").textContent === "live" && document.getElementById("sessions").children.length === 3`)
	if f.focused() != first {
		t.Errorf("the focus is at %s, not where it was", f.focused())
	}
	f.takeFaults() // connections that the hand-over has cut

	t.Log("end")
	f.press("x")
	f.await("there is a question", `document.getElementById("confirm").open`)
	f.shots("confirm")
	f.press("Enter")
	f.await("Enter keeps it", `!document.getElementById("confirm").open`)
	shop.say("still there")
	f.press("x")
	f.await("there is a question", `document.getElementById("confirm").open`)
	f.press("Tab")
	if f.focused() != "confirm-yes" {
		t.Errorf("Tab comes to %s", f.focused())
	}
	f.press("Enter")
	if err := testutil.Receive(t, "the session ends", shop.ended); err == nil || !strings.Contains(err.Error(), "operator") {
		t.Errorf("its user was told %v", err)
	}
	f.awaitRows(2)
	if at := f.focused(); at == "BODY" || at == first {
		t.Errorf("the focus was lost with its row: %s", at)
	}

	t.Log("a watch ends with its session")
	f.eval(`document.querySelector("#sessions tr:first-child [data-act=Watch]").click()`)
	f.await("the watch has begun", `document.getElementById("screen-note").textContent.startsWith("Read-only")`)
	fmt.Fprintln(bank.typed, "exit")
	if err := testutil.Receive(t, "the shell ends", bank.ended); err != nil {
		t.Error(err)
	}
	f.await("the page says so", `document.getElementById("screen-note").textContent === "The session has ended."`)
	f.press("Escape")

	t.Log("replay")
	f.await("the recording is listed", `document.getElementById("recordings").children.length === 1`)
	f.eval(`document.querySelector("#recordings tr").focus()`)
	f.press("Enter")
	f.await("it is played", `document.querySelector("#terminal .ap-player")?.innerText.includes("before")`)
	f.eval(`new Promise((passed) => setTimeout(passed, 1500))`)
	f.shots("replay")
	f.press("Escape")
	f.await("Esc closes it", `!document.getElementById("screen").open`)
	f.quiet()

	evil.leave()
	f.awaitRows(0)
	f.await("the end is said", `document.getElementById("none").innerText === "Nobody is in a pod of this node."`)

	t.Log("no connection")
	f.shim.Stop(t, syscall.SIGTERM)
	f.await("a streamshim that has gone is named", `!document.getElementById("problem").hidden && document.getElementById("problem").innerText.includes("is streamshim running")`)
	f.shots("gone")
	f.shim.Start(t)
	f.await("it is found again", `document.getElementById("problem").hidden && document.getElementById("status").textContent === "live"`)
	f.stopPage()
	f.await("a page that has gone is named", `document.getElementById("problem").innerText.includes("does not answer")`)
}

// walk is where Tab comes to, in order, from the page's beginning.
func (f *fixture) walk() (seen []string) {
	f.t.Helper()
	f.eval(`document.activeElement.blur()`)
	for range 20 {
		f.press("Tab")
		seen = append(seen, f.focused())
	}
	return seen
}
