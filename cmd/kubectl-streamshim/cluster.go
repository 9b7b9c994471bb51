package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	"github.com/streamshim/streamshim/pkg/admin"
)

const (
	defaultNodeTimeout = 15 * time.Second
	nodesAtOnce        = 16 // how many nodes are asked at the same time
	selector           = "app.kubernetes.io/name=streamshim,app.kubernetes.io/component=agent"
	container          = "agent"
)

// cluster asks the nodes that have an agent, by running kubectl.
type cluster struct {
	kubectl, context, kubeconfig string
	agents                       string // namespace of the agents
	timeout                      time.Duration
}

// agent is a pod of the DaemonSet.
type agent struct{ pod, node string }

// on is an item of a node.
type on[T any] struct {
	agent agent
	item  T
}

// command returns a kubectl command that ends with the context.
func (c *cluster) command(ctx context.Context, args ...string) *exec.Cmd {
	if c.context != "" {
		args = append([]string{"--context=" + c.context}, args...)
	}
	if c.kubeconfig != "" {
		args = append([]string{"--kubeconfig=" + c.kubeconfig}, args...)
	}
	command := exec.CommandContext(ctx, c.kubectl, args...)
	command.WaitDelay = time.Second
	return command
}

func (c *cluster) output(ctx context.Context, args ...string) ([]byte, error) {
	command := c.command(ctx, args...)
	var stderr bytes.Buffer
	command.Stderr = &stderr
	out, err := command.Output()
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("kubectl %s: %w: %s", args[0], err, strings.TrimSpace(stderr.String()))
	}
	return out, nil
}

// running lists the agents.
func (c *cluster) running(ctx context.Context) ([]agent, error) {
	out, err := c.output(ctx, "get", "pods", "--namespace="+c.agents, "--selector="+selector, "--output=json")
	if err != nil {
		return nil, err
	}
	var pods struct {
		Items []struct {
			Metadata struct{ Name string }
			Spec     struct{ NodeName string }
			Status   struct{ Phase string }
		}
	}
	if err := json.Unmarshal(out, &pods); err != nil {
		return nil, err
	}
	var agents []agent
	for _, p := range pods.Items {
		if p.Status.Phase == "Running" {
			agents = append(agents, agent{p.Metadata.Name, p.Spec.NodeName})
		}
	}
	if len(agents) == 0 {
		return nil, fmt.Errorf("no pod of streamshim's DaemonSet runs in the namespace %s; name another one with --agents", c.agents)
	}
	return agents, nil
}

// exec returns the arguments of a kubectl exec that runs "streamshim sessions" in an agent's container.
func (c *cluster) exec(a agent, flags []string, args ...string) []string {
	return append(append(append([]string{"exec", "--namespace=" + c.agents, a.pod, "--container=" + container}, flags...), "--", "streamshim", "sessions"), args...)
}

// all asks every node. It returns the answers of some nodes together with the errors of others.
func all[T any](ctx context.Context, c *cluster, ask func(context.Context, agent) ([]T, error)) ([]on[T], error) {
	agents, err := c.running(ctx)
	if err != nil {
		return nil, err
	}
	answers, errs := make([][]T, len(agents)), make([]error, len(agents))
	turns := make(chan struct{}, nodesAtOnce)
	var asking sync.WaitGroup
	for n, a := range agents {
		asking.Go(func() {
			turns <- struct{}{}
			defer func() { <-turns }()
			ctx, cancel := context.WithTimeout(ctx, c.timeout)
			defer cancel()
			if answers[n], errs[n] = ask(ctx, a); errs[n] != nil {
				errs[n] = fmt.Errorf("node %s: %w", a.node, errs[n])
			}
		})
	}
	asking.Wait()
	var found []on[T]
	for n, answer := range answers {
		for _, item := range answer {
			found = append(found, on[T]{agents[n], item})
		}
	}
	return found, errors.Join(errs...)
}

func (c *cluster) sessions(ctx context.Context) ([]on[admin.Session], error) {
	return all(ctx, c, func(ctx context.Context, a agent) ([]admin.Session, error) {
		out, err := c.output(ctx, c.exec(a, nil, "list", "--output=json")...)
		if err != nil {
			return nil, err
		}
		var list admin.SessionList
		err = json.Unmarshal(out, &list)
		return list.Sessions, err
	})
}

func (c *cluster) recordings(ctx context.Context) ([]on[admin.Recording], error) {
	return all(ctx, c, func(ctx context.Context, a agent) ([]admin.Recording, error) {
		out, err := c.output(ctx, c.exec(a, nil, "recordings", "--output=json")...)
		if err != nil {
			return nil, err
		}
		var list admin.RecordingList
		err = json.Unmarshal(out, &list)
		return list.Recordings, err
	})
}

// session returns the session whose ID begins with id. A node that does not answer is an error only if no other node has
// the session.
func (c *cluster) session(ctx context.Context, id string) (on[admin.Session], error) {
	sessions, err := c.sessions(ctx)
	var found []on[admin.Session]
	for _, s := range sessions {
		if strings.HasPrefix(s.item.ID, id) {
			found = append(found, s)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return on[admin.Session]{}, fmt.Errorf("%d sessions begin with %q; write more of the id", len(found), id)
	}
	return on[admin.Session]{}, errors.Join(fmt.Errorf("no live session %q; it may have ended", id), err)
}

// attach runs "streamshim sessions" in an agent with the user's own streams, and with a terminal if the user has one.
func (c *cluster) attach(ctx context.Context, a agent, out io.Writer, args ...string) error {
	var flags []string
	terminal := term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stdout.Fd()))
	if terminal {
		flags = []string{"--stdin", "--tty"}
	}
	command := c.command(ctx, c.exec(a, flags, args...)...)
	command.Stdout, command.Stderr = out, os.Stderr
	if terminal {
		command.Stdin = os.Stdin
	}
	err := command.Run()
	var ended *exec.ExitError
	if errors.As(err, &ended) {
		return errors.New("see above") // kubectl or streamshim has printed the error
	}
	return err
}
