package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/kubernetes"
)

// podName is a name that no other check uses.
func podName(kind string) string { return kind + "-" + uniqueNumber() }

func checkProbeReadiness(ctx context.Context, t *target) (string, error) {
	number := uniqueNumber()
	pods := map[string]string{ // by probe command: whether the pod becomes Ready
		"[test, -e, /tmp/ready]":    "False",
		"[sleep, '" + number + "']": "False",
		"['true']":                  "True",
	}
	names := map[string]string{}
	for command := range pods {
		name := podName("readiness")
		names[command] = name
		defer t.deletePod(name)
		probe := fmt.Sprintf("readinessProbe: {exec: {command: %s}, periodSeconds: 1, timeoutSeconds: 1, failureThreshold: 1}", command)
		if err := t.createPod(ctx, podOptions{name: name, main: probe}); err != nil {
			return "", err
		}
	}
	ready := func(command, want string) error {
		return until(ctx, func() error {
			got, err := t.podField(ctx, names[command], `.status.conditions[?(@.type=="Ready")].status`)
			if err == nil && got != want {
				err = fmt.Errorf("with probe %s Ready is %s, not %s", command, got, want)
			}
			return err
		})
	}
	for command, want := range pods {
		if err := ready(command, want); err != nil {
			return "", err
		}
	}
	for command, event := range map[string]string{"[test, -e, /tmp/ready]": "Readiness probe failed", "[sleep, '" + number + "']": "timed out"} {
		if err := t.waitEvent(ctx, names[command], event); err != nil {
			return "", err
		}
	}
	// A pod that becomes Ready when its probe begins to pass.
	if o := t.run(ctx, "exec", names["[test, -e, /tmp/ready]"], "--", "touch", "/tmp/ready"); o.code != 0 {
		return "", errors.New(o.String())
	}
	if err := ready("[test, -e, /tmp/ready]", "True"); err != nil {
		return "", err
	}
	// Only the probe that runs now may be there, or its successor beside it.
	err := within(ctx, 10*time.Second, func(ctx context.Context) error {
		return until(ctx, func() error {
			if left := len(sleepers(number)); left > 2 {
				return fmt.Errorf("%d processes of timed-out probes are left", left)
			}
			return nil
		})
	})
	return "pass, fail, time out, recover; nothing left", err
}

// waitEvent waits until an event of the pod contains the text.
func (t *target) waitEvent(ctx context.Context, pod, text string) error {
	return until(ctx, func() error {
		messages, err := t.must(ctx, "get", "events", "--field-selector", "involvedObject.name="+pod, "-o", "jsonpath={.items[*].message}")
		if err == nil && !strings.Contains(messages, text) {
			err = fmt.Errorf("no event with %q, only %q", text, messages)
		}
		return err
	})
}

func checkProbeLiveness(ctx context.Context, t *target) (string, error) {
	commands := []string{"['false']", "[sleep, '" + uniqueNumber() + "']"}
	for _, command := range commands {
		name := podName("liveness")
		defer t.deletePod(name)
		probe := fmt.Sprintf("livenessProbe: {exec: {command: %s}, periodSeconds: 1, timeoutSeconds: 1, failureThreshold: 2}", command)
		if err := t.createPod(ctx, podOptions{name: name, main: probe}); err != nil {
			return "", err
		}
		err := until(ctx, func() error {
			restarts, err := t.podField(ctx, name, ".status.containerStatuses[0].restartCount")
			if err == nil && (restarts == "0" || restarts == "") {
				err = fmt.Errorf("with probe %s the container was not restarted", command)
			}
			return err
		})
		if err != nil {
			return "", err
		}
	}
	return "fail, time out: container restarted", nil
}

// sessionPod runs a pod whose main process can be found on the host, with an exec session in it.
func (t *target) sessionPod(ctx context.Context, fields string) (name, mainNumber string, s *terminal, err error) {
	name, mainNumber = podName("session"), uniqueNumber()
	if err := t.runPod(ctx, podOptions{name: name, pod: fields, command: "exec sleep " + mainNumber}); err != nil {
		return name, mainNumber, nil, err
	}
	s, err = t.startTerminal(ctx, "exec", "-it", name, "--", "sh", "-c", "echo ready; exec sleep 2147483647")
	if err != nil {
		return name, mainNumber, nil, err
	}
	if err := s.expect(ctx, "ready"); err != nil {
		s.close()
		return name, mainNumber, nil, err
	}
	return name, mainNumber, s, nil
}

// endOf waits until kubectl ends, which must not be a success.
func endOf(ctx context.Context, s *terminal) (string, error) {
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	code, err := s.wait(ctx)
	if err != nil {
		return "", err
	}
	if code == 0 {
		return "", errors.New("kubectl ended with exit code 0")
	}
	return fmt.Sprintf("kubectl ends within %d s, exit code %d", int(time.Since(start).Seconds())+1, code), nil
}

func checkContainerRestart(ctx context.Context, t *target) (string, error) {
	name, number, s, err := t.sessionPod(ctx, "")
	defer t.deletePod(name)
	if err != nil {
		return "", err
	}
	defer s.close()
	pids := sleepers(number)
	if len(pids) != 1 {
		return "", fmt.Errorf("found %d main processes", len(pids))
	}
	if err := unix.Kill(pids[0], unix.SIGKILL); err != nil {
		return "", err
	}
	text, err := endOf(ctx, s)
	if err != nil {
		return "", err
	}
	err = until(ctx, func() error {
		if o := t.run(ctx, "exec", name, "--", "echo", "again"); o.stdout != "again\n" {
			return fmt.Errorf("no exec in the new container: %s", o)
		}
		return nil
	})
	return text + "; exec works in the new one", err
}

// checkPodDeletion is also kubernetes#89233: with a shared process namespace, nothing but the runtime
// ends the exec'd process.
func checkPodDeletion(ctx context.Context, t *target) (string, error) {
	var text string
	for _, fields := range []string{"", "shareProcessNamespace: true"} {
		name, _, s, err := t.sessionPod(ctx, fields)
		defer t.deletePod(name)
		if err != nil {
			return "", err
		}
		defer s.close()
		if o := t.run(ctx, "delete", "pod", name, "--wait=false"); o.code != 0 {
			return "", errors.New(o.String())
		}
		if text, err = endOf(ctx, s); err != nil {
			return "", fmt.Errorf("%s %w", fields, err)
		}
	}
	return text, nil
}

func checkDebug(ctx context.Context, t *target) (string, error) {
	name, number := podName("debug"), uniqueNumber()
	defer t.deletePod(name)
	if err := t.runPod(ctx, podOptions{name: name, command: "exec sleep " + number}); err != nil {
		return "", err
	}
	image, err := t.podField(ctx, name, ".spec.containers[0].image")
	if err != nil {
		return "", err
	}
	s, err := t.startTerminal(ctx, "debug", "-it", name, "--image="+image, "--image-pull-policy=IfNotPresent",
		"--target=main", "--profile=general", "--quiet", "--", "sh")
	if err != nil {
		return "", err
	}
	defer s.close()
	// The prompt may have been written before kubectl attached, so the first answer is asked for until
	// it comes.
	err = within(ctx, 40*time.Second, func(ctx context.Context) error {
		return until(ctx, func() error {
			if strings.Contains(s.output.String(), "sees sleep "+number) {
				return nil
			}
			if err := s.write("echo sees $(tr '\\0' ' ' </proc/1/cmdline)\n"); err != nil {
				return fatal{err}
			}
			return fmt.Errorf("no answer, output %q", s.output.String())
		})
	})
	if err != nil {
		return "", err
	}
	if err := s.write("exit 0\n"); err != nil {
		return "", err
	}
	code, err := s.wait(ctx)
	if err != nil {
		return "", err
	}
	return verdict(code == 0, "ephemeral container answers, sees its target, exit code %d", code)
}

func checkHostNetwork(ctx context.Context, t *target) (string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	port := listener.Addr().(*net.TCPAddr).Port
	_ = listener.Close() // another process may take it before the pod does; then the check fails loudly
	name := podName("hostnetwork")
	defer t.deletePod(name)
	err = t.runPod(ctx, podOptions{
		name: name, pod: "hostNetwork: true",
		command: fmt.Sprintf("mkdir /srv; echo host >/srv/page; httpd -p 127.0.0.1:%d -h /srv; exec sleep 2147483647", port),
	})
	if err != nil {
		return "", err
	}
	if o := t.run(ctx, "exec", name, "--", "cat", "/srv/page"); o.stdout != "host\n" {
		return "", errors.New(o.String())
	}
	f, err := t.forward(ctx, name, port)
	if err != nil {
		return "", err
	}
	defer f.close()
	return "exec and port-forward", f.expectPage(ctx, port, "host")
}

func checkNonRoot(ctx context.Context, t *target) (string, error) {
	name := podName("nonroot")
	defer t.deletePod(name)
	if err := t.runPod(ctx, podOptions{name: name, pod: "securityContext: {runAsNonRoot: true, runAsUser: 1234, runAsGroup: 2345, supplementalGroups: [3456]}"}); err != nil {
		return "", err
	}
	const command = "id -u; id -G; cat /proc/self/status | grep CapEff; echo err >/dev/stderr; echo out >/dev/stdout"
	o := t.run(ctx, "exec", name, "--", "sh", "-c", command)
	if o.code != 0 || !strings.HasPrefix(o.stdout, "1234\n2345 3456\nCapEff:\t0000000000000000\n") || !strings.HasSuffix(o.stdout, "out\n") {
		return "", errors.New(o.String())
	}
	s, err := t.startTerminal(ctx, "exec", "-it", name, "--", "sh", "-c", "id -u; echo out >/dev/tty")
	if err != nil {
		return "", err
	}
	defer s.close()
	code, err := s.wait(ctx)
	if err != nil {
		return "", err
	}
	if code != 0 || !strings.Contains(s.output.String(), "1234\r\nout") {
		return "", fmt.Errorf("exit code %d, output %q", code, s.output.String())
	}
	return "exec as 1234, streams and terminal usable", nil
}

func checkUserNamespace(ctx context.Context, t *target) (string, error) {
	name := podName("userns")
	defer t.deletePod(name)
	if err := t.runPod(ctx, podOptions{name: name, pod: "hostUsers: false"}); err != nil {
		return "", fmt.Errorf("%w: %w", errImpossible, err)
	}
	o := t.run(ctx, "exec", name, "--", "sh", "-c", "id -u; cat /proc/self/uid_map; echo out >/dev/stdout")
	fields := strings.Fields(o.stdout)
	if o.code != 0 || len(fields) != 5 || fields[0] != "0" || fields[2] == "0" || fields[4] != "out" {
		return "", errors.New(o.String())
	}
	s, err := t.startTerminal(ctx, "exec", "-it", name, "--", "sh", "-c", "echo out >/dev/tty")
	if err != nil {
		return "", err
	}
	defer s.close()
	code, err := s.wait(ctx)
	if err != nil {
		return "", err
	}
	return verdict(code == 0, "exec as root of the namespace, with -it exit code %d", code)
}

func checkSharedProcesses(ctx context.Context, t *target) (string, error) {
	name, number := podName("sharedpid"), uniqueNumber()
	defer t.deletePod(name)
	if err := t.runPod(ctx, podOptions{name: name, pod: "shareProcessNamespace: true", command: "exec sleep " + number}); err != nil {
		return "", err
	}
	o := t.run(ctx, "exec", name, "--", "sh", "-c", "ps; cat /proc/1/comm")
	return verdict(o.code == 0 && strings.Contains(o.stdout, "sleep "+number) && strings.HasSuffix(o.stdout, "pause\n"), "exec sees the pod's processes, exit code %d", o.code)
}

// checkContainerdRestart kills containerd and starts it again under three sessions.
func checkContainerdRestart(ctx context.Context, t *target) (string, error) {
	return sessionsGoOn(ctx, t, func(f *forwarding) (whileDown, err error) {
		if err := t.node.KillContainerd(); err != nil {
			return nil, err
		}
		whileDown = f.expectPage(ctx, 8081, "second")
		return whileDown, t.node.StartContainerd(ctx)
	})
}

// checkUpgrade has streamshim taken over by itself, as by another version, with the kubelet in front of it: beside the
// sessions, nothing of the node and of a probed pod is to change.
func checkUpgrade(ctx context.Context, t *target) (string, error) {
	if t.streamshim == "" {
		return "nothing to upgrade", nil
	}
	probed := podName("probed")
	defer t.deletePod(probed)
	probe := "{exec: {command: ['true']}, periodSeconds: 1, timeoutSeconds: 1, failureThreshold: 1}"
	if err := t.createPod(ctx, podOptions{name: probed, main: "readinessProbe: " + probe + ", livenessProbe: " + probe}); err != nil {
		return "", err
	}
	steady := func() (string, error) {
		pod, err := t.podField(ctx, probed, `.status.conditions[?(@.type=="Ready")]`)
		if err != nil || !strings.Contains(pod, `"status":"True"`) {
			return "", errors.Join(err, fmt.Errorf("the probed pod is not ready: %s", pod))
		}
		restarts, err := t.podField(ctx, probed, ".status.containerStatuses[0].restartCount")
		if err != nil {
			return "", err
		}
		node, err := t.must(ctx, "get", "node", t.node.Address, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status} since {.status.conditions[?(@.type=="Ready")].lastTransitionTime}`)
		if err != nil {
			return "", err
		}
		failures, err := t.must(ctx, "get", "events", "--field-selector", "reason=Unhealthy,involvedObject.name="+probed, "-o", "jsonpath={.items[*].count}")
		return "pod " + pod + " restarts " + restarts + ", failed probes (" + failures + "), node " + node, err
	}
	var before string
	if err := until(ctx, func() (err error) { before, err = steady(); return err }); err != nil {
		return "", err
	}
	const upgrades, apart = 10, time.Second // so that probes come before, in and behind them
	var said []string
	result, err := sessionsGoOn(ctx, t, func(*forwarding) (whileDown, err error) {
		ticker := time.NewTicker(apart)
		defer ticker.Stop()
		for range upgrades {
			<-ticker.C
			out, err := exec.CommandContext(ctx, t.streamshim, "upgrade", "--admin", "unix://"+t.node.AdminSocket()).CombinedOutput()
			if err != nil {
				return nil, fmt.Errorf("streamshim upgrade: %w: %s", err, out)
			}
			said = append(said, strings.TrimSpace(string(out)))
		}
		return nil, nil
	})
	if err != nil {
		return "", fmt.Errorf("%w (%s)", err, strings.Join(said, "; "))
	}
	if after, err := steady(); err != nil || after != before {
		return "", errors.Join(err, fmt.Errorf("before: %s; after: %s", before, after))
	}
	return fmt.Sprintf("%d times: %s; no probe fails, the node stays Ready", upgrades, result), nil
}

// sessionsGoOn interrupts something under an exec -it, a stream and a port-forward, which must not notice it. What the interruption
// sees while something is down is one of the things that must work.
func sessionsGoOn(ctx context.Context, t *target, interrupt func(*forwarding) (whileDown, err error)) (string, error) {
	s, err := t.startTerminal(ctx, "exec", "-it", t.pod, "--", "sh", "-c", `echo ready; while read -r line; do echo "got $line"; done`)
	if err != nil {
		return "", err
	}
	defer s.close()
	if err := s.expect(ctx, "ready"); err != nil {
		return "", err
	}
	const lines = 150 // 15 s
	stream := t.kubectl(ctx, "exec", t.pod, "--", "sh", "-c", fmt.Sprintf("i=0; while [ $i -lt %d ]; do echo line $i; i=$((i+1)); usleep 100000; done; exit 5", lines))
	var output testutil.Buffer
	stream.Stdout = &output
	if err := stream.Start(); err != nil {
		return "", err
	}
	f, err := t.forward(ctx, t.pod, 8080, 8081)
	if err != nil {
		return "", err
	}
	defer f.close()
	if err := until(ctx, func() error {
		if !strings.Contains(output.String(), "line 5\n") {
			return errors.New("the stream does not begin")
		}
		return nil
	}); err != nil {
		return "", err
	}

	whileDown, err := interrupt(f)
	if err != nil {
		return "", err
	}

	var broken []string
	note := func(what string, err error) {
		if err != nil {
			broken = append(broken, what+": "+err.Error())
		}
	}
	note("port-forward while it is down", whileDown)
	note("port-forward", f.expectPage(ctx, 8080, "first"))
	if err := s.write("something\n"); err != nil {
		note("exec -it", err)
	} else {
		note("exec -it", within(ctx, 10*time.Second, func(ctx context.Context) error { return s.expect(ctx, "got something") }))
	}
	code := exitCode(stream.Wait())
	if got := strings.Count(output.String(), "line "); got != lines || code != 5 {
		note("stream", fmt.Errorf("%d of %d lines, exit code %d", got, lines, code))
	}
	if o := t.run(ctx, "exec", t.pod, "--", "echo", "again"); o.stdout != "again\n" {
		note("a new exec", errors.New(o.String()))
	}
	if len(broken) > 0 {
		return "", errors.New(strings.Join(broken, "; "))
	}
	return "exec -it, stream and port-forward go on", nil
}

func checkKubeletRestart(ctx context.Context, t *target) (string, error) {
	number := uniqueNumber()
	defer killSleepers(number)
	s, err := t.startTerminal(ctx, "exec", "-it", t.pod, "--", "sleep", number)
	if err != nil {
		return "", err
	}
	defer s.close()
	if err := waitSleepers(ctx, number, 1); err != nil {
		return "", err
	}
	before, err := t.podField(ctx, t.pod, ".status.containerStatuses[0].containerID")
	if err != nil {
		return "", err
	}
	if err := errors.Join(t.node.StopKubelet(), t.node.StartKubelet(ctx, true), t.node.WaitReady(ctx)); err != nil {
		return "", err
	}
	if err := until(ctx, func() error {
		if o := t.run(ctx, "exec", t.pod, "--", "echo", "again"); o.stdout != "again\n" {
			return fmt.Errorf("no exec after the restart: %s", o)
		}
		return nil
	}); err != nil {
		return "", err
	}
	after, err := t.podField(ctx, t.pod, ".status.containerStatuses[0].containerID")
	if err != nil {
		return "", err
	}
	if before != after {
		return "", errors.New("the container was restarted")
	}
	// The session went through the kubelet, so it has ended; its process must not stay.
	if err := within(ctx, 20*time.Second, func(ctx context.Context) error { return waitSleepers(ctx, number, 0) }); err != nil {
		return "", fmt.Errorf("exec works again, but the session's process is left: %w", err)
	}
	return "containers untouched, exec works again, nothing left", nil
}

// usage is what streamshim holds.
type usage struct{ descriptors, children, goroutines int }

func (u usage) String() string {
	return fmt.Sprintf("%d descriptors, %d children, %d goroutines", u.descriptors, u.children, u.goroutines)
}

func usageOf(ctx context.Context, n *kubernetes.Node) (usage, error) {
	process := filepath.Join("/proc", strconv.Itoa(n.PID("streamshim")))
	descriptors, err := os.ReadDir(filepath.Join(process, "fd"))
	if err != nil {
		return usage{}, err
	}
	u := usage{descriptors: len(descriptors)}
	lists, err := filepath.Glob(filepath.Join(process, "task/*/children"))
	if err != nil {
		return usage{}, err
	}
	for _, list := range lists {
		children, err := os.ReadFile(list)
		if err != nil {
			continue // a thread that ended
		}
		u.children += len(strings.Fields(string(children)))
	}
	metrics, err := n.Metrics(ctx)
	if err != nil {
		return usage{}, err
	}
	_, rest, found := strings.Cut(metrics, "\ngo_goroutines ")
	number, _, _ := strings.Cut(rest, "\n")
	if u.goroutines, err = strconv.Atoi(number); err != nil || !found {
		return usage{}, fmt.Errorf("no number of goroutines in the metrics: %w", err)
	}
	return u, nil
}
