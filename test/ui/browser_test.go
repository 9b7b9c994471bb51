package ui

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/gorilla/websocket"

	"github.com/streamshim/streamshim/internal/testutil"
)

// browser is a headless Chromium, driven by the DevTools protocol
// (https://chromedevtools.github.io/devtools-protocol/).
type browser struct {
	t    *testing.T
	conn *websocket.Conn

	mu      sync.Mutex
	next    int
	waiting map[int]chan answer
	faults  []string // what the pages' consoles have said
}

type answer struct {
	ID     int             `json:"id"`
	Result json.RawMessage `json:"result"`
	Error  *struct {
		Message string `json:"message"`
	} `json:"error"`
	Method string          `json:"method"`
	Params json.RawMessage `json:"params"`
}

func startBrowser(t *testing.T) *browser {
	t.Helper()
	program, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatalf("%v; make ui-test installs it", err)
	}
	// Not t.TempDir: helpers of Chromium may write to it for a moment after its end.
	profile, err := os.MkdirTemp("", "chromium")
	if err != nil {
		t.Fatal(err)
	}
	command := exec.Command(program, "--headless=new", "--no-sandbox", "--remote-debugging-port=0", "--user-data-dir="+profile,
		"--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking", "--disable-component-update", "about:blank")
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stderr, err := command.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	address, drained := make(chan string, 1), make(chan struct{})
	go func() {
		defer close(drained)
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			if _, found, ok := strings.Cut(lines.Text(), "DevTools listening on "); ok {
				address <- found
			}
		}
	}()
	t.Cleanup(func() {
		syscall.Kill(-command.Process.Pid, syscall.SIGKILL)
		<-drained
		command.Wait()
		os.RemoveAll(profile)
	})
	b := &browser{t: t, waiting: make(map[int]chan answer)}
	if b.conn, _, err = websocket.DefaultDialer.DialContext(t.Context(), testutil.Receive(t, "Chromium's DevTools", address), nil); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		b.read()
	}()
	t.Cleanup(func() {
		b.conn.Close()
		<-read
	})
	return b
}

func (b *browser) read() {
	for {
		var a answer
		if err := b.conn.ReadJSON(&a); err != nil {
			return
		}
		b.mu.Lock()
		if waiting, ok := b.waiting[a.ID]; ok && a.ID != 0 {
			delete(b.waiting, a.ID)
			waiting <- a
		}
		switch a.Method {
		case "Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening":
			b.faults = append(b.faults, a.Method+" "+string(a.Params))
		}
		b.mu.Unlock()
	}
}

// takeFaults returns what the pages' consoles have said since the last call: exceptions, refusals of the
// Content-Security-Policy, failed requests, dialogs.
func (b *browser) takeFaults() (faults []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	faults, b.faults = b.faults, nil
	return faults
}

func (b *browser) call(session, method string, params, result any) {
	b.t.Helper()
	if err := b.ask(session, method, params, result); err != nil {
		b.t.Fatalf("%s: %v", method, err)
	}
}

// ask is call with an error, which is what the browser has refused: while a page is loaded anew, for one.
func (b *browser) ask(session, method string, params, result any) error {
	b.t.Helper()
	waiting := make(chan answer, 1)
	b.mu.Lock()
	b.next++
	id := b.next
	b.waiting[id] = waiting
	err := b.conn.WriteJSON(map[string]any{"id": id, "method": method, "params": params, "sessionId": session})
	b.mu.Unlock()
	if err != nil {
		b.t.Fatal(err)
	}
	a := testutil.Receive(b.t, "the answer to "+method, waiting)
	if a.Error != nil {
		return errors.New(a.Error.Message)
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(a.Result, result)
}

// page is a tab with cookies of its own.
type page struct {
	*browser
	session string
}

type object = map[string]any

func (b *browser) open(url string) *page {
	b.t.Helper()
	var context struct{ BrowserContextID string }
	b.call("", "Target.createBrowserContext", object{}, &context)
	var target struct{ TargetID string }
	b.call("", "Target.createTarget", object{"url": "about:blank", "browserContextId": context.BrowserContextID}, &target)
	var attached struct{ SessionID string }
	b.call("", "Target.attachToTarget", object{"targetId": target.TargetID, "flatten": true}, &attached)
	p := &page{browser: b, session: attached.SessionID}
	for _, domain := range []string{"Page", "Runtime", "Log"} {
		p.do(domain+".enable", object{})
	}
	// Before the page's own scripts, so that none is missed.
	p.do("Page.addScriptToEvaluateOnNewDocument", object{"source": `window.shifts = 0;
		new PerformanceObserver((list) => { for (const e of list.getEntries()) if (!e.hadRecentInput) window.shifts += e.value; }).observe({ type: "layout-shift", buffered: true });`})
	p.look(1600, false)
	p.do("Page.navigate", object{"url": url})
	p.await("the page is loaded", `document.readyState === "complete" && location.href !== "about:blank"`)
	return p
}

func (p *page) do(method string, params object) {
	p.t.Helper()
	p.call(p.session, method, params, nil)
}

// look is what the page is looked at with: a window so wide, in light or dark.
func (p *page) look(width int, dark bool) {
	p.t.Helper()
	height := 900
	if width < 700 {
		height = 800
	}
	p.do("Emulation.setDeviceMetricsOverride", object{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false})
	scheme := "light"
	if dark {
		scheme = "dark"
	}
	p.do("Emulation.setEmulatedMedia", object{"features": []object{{"name": "prefers-color-scheme", "value": scheme}}})
}

// eval returns what an expression of JavaScript is.
func (p *page) eval(expression string) any {
	p.t.Helper()
	value, err := p.tryEval(expression)
	if err != nil {
		p.t.Fatalf("%s: %v", expression, err)
	}
	return value
}

func (p *page) tryEval(expression string) (any, error) {
	p.t.Helper()
	var result struct {
		Result           struct{ Value any }
		ExceptionDetails *struct{ Exception struct{ Description string } }
	}
	if err := p.ask(p.session, "Runtime.evaluate", object{"expression": expression, "returnByValue": true, "awaitPromise": true}, &result); err != nil {
		return nil, err
	}
	if result.ExceptionDetails != nil {
		return nil, errors.New(result.ExceptionDetails.Exception.Description)
	}
	return result.Result.Value, nil
}

// await waits until an expression of JavaScript is true. What cannot be asked yet, while the page is loaded anew, is not.
func (p *page) await(what, expression string) {
	p.t.Helper()
	var failed error
	defer func() {
		if !p.t.Failed() {
			return
		}
		if failed != nil {
			p.t.Logf("%s: %v", expression, failed)
		}
		p.shot("failed")
	}()
	testutil.Eventually(p.t, what, func() bool {
		var value any
		value, failed = p.tryEval(expression)
		return value == true
	})
}

// keys are those that are no characters.
var keys = map[string]int{"Tab": 9, "Enter": 13, "Escape": 27, "ArrowDown": 40, "ArrowUp": 38}

// press presses a key, as a keyboard does.
func (p *page) press(key string) {
	p.t.Helper()
	down := object{"type": "keyDown", "key": key}
	if code, ok := keys[key]; ok {
		down["windowsVirtualKeyCode"], down["code"] = code, key
		if key == "Enter" {
			down["text"] = "\r"
		}
	} else {
		down["text"] = key
	}
	p.do("Input.dispatchKeyEvent", down)
	p.do("Input.dispatchKeyEvent", object{"type": "keyUp", "key": key})
}

// focused is what has the focus: an id, or the word on a button, or the key of a row.
func (p *page) focused() string {
	p.t.Helper()
	return fmt.Sprint(p.eval(`(() => { const e = document.activeElement; return e.id || (e.dataset.act && e.dataset.act + " " + e.closest("tr").dataset.key) || e.dataset.key || e.className || e.tagName; })()`))
}

// shot leaves a picture in .artefacts/ui.
func (p *page) shot(name string) {
	p.t.Helper()
	var picture struct{ Data string }
	p.call(p.session, "Page.captureScreenshot", object{"format": "png"}, &picture)
	data, err := base64.StdEncoding.DecodeString(picture.Data)
	if err != nil {
		p.t.Fatal(err)
	}
	folder := filepath.Join("..", "..", ".artefacts", "ui")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, name+".png"), data, 0o644); err != nil {
		p.t.Fatal(err)
	}
}

// shots is a picture in each look, in each of which the page is no wider than the window.
func (p *page) shots(name string) {
	p.t.Helper()
	for _, width := range []int{400, 1600} {
		for _, dark := range []bool{false, true} {
			p.look(width, dark)
			p.eval(`new Promise((drawn) => setTimeout(drawn, 300))`) // a terminal is drawn again in its new size
			if wide := p.eval(`document.documentElement.scrollWidth - document.documentElement.clientWidth`); wide.(float64) > 0 {
				p.t.Errorf("%s at %d: %v pixels wider than the window", name, width, wide)
			}
			scheme := map[bool]string{false: "light", true: "dark"}[dark]
			p.shot(fmt.Sprintf("%s-%d-%s", name, width, scheme))
		}
	}
	p.look(1600, false)
}

// startPage starts "streamshim ui" and returns its address, and what ends it as ^C does.
func startPage(t *testing.T, program string, args ...string) (address string, stop func()) {
	t.Helper()
	command := exec.Command(program, append([]string{"ui"}, args...)...)
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	address, err = bufio.NewReader(stdout).ReadString('\n')
	go func() { ended <- command.Wait() }()
	stop = sync.OnceFunc(func() {
		command.Process.Signal(os.Interrupt)
		if err := testutil.Receive(t, "streamshim ui ends at ^C", ended); err != nil {
			t.Errorf("streamshim ui: %v", err)
		}
	})
	t.Cleanup(stop)
	if err != nil {
		t.Fatalf("streamshim ui says nothing: %v", err)
	}
	return strings.TrimSpace(address), stop
}
