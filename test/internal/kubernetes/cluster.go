// Package kubernetes runs a small real Kubernetes cluster for tests: etcd, kube-apiserver and a kubelet for each node of
// test/internal/node, with or without streamshim in front of the node's containerd. There is no scheduler and no
// controller-manager: pods name their node. Everything listens on loopback addresses of this cluster and is below one
// folder, so clusters can run side by side. It needs root and the programs that "test/internal/peers/build.sh etcd
// kubernetes" builds, in addition to those of test/internal/node.
//
// All processes are companions of the cluster's nodes. So taking down the nodes takes down the cluster, even one whose
// owner was killed.
package kubernetes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/streamshim/streamshim/test/internal/node"
)

// Config describes a cluster to start.
type Config struct {
	// Dir is the folder that everything is below. Its path has at most 70 bytes.
	Dir string
	// Nodes are the cluster's nodes. The folder of the first one also records the control plane.
	Nodes []NodeConfig
	// Logf is called with each line about what happens. It may be nil.
	Logf func(format string, args ...any)
}

// NodeConfig describes a node to start.
type NodeConfig struct {
	// Name is that of the folder below Config.Dir: at most 6 lower-case letters. It is not the node's name in Kubernetes,
	// which must be an IP address. See Node.Address.
	Name string
	// Streamshim is the path of the streamshim program. If empty, the kubelet talks to containerd itself.
	Streamshim string
}

// Cluster is a running cluster.
type Cluster struct {
	dir    string
	logf   func(string, ...any)
	nodes  []*Node
	client *http.Client
}

// Node is one node of a cluster.
type Node struct {
	*node.Node
	// Address is the node's IP address and its name in Kubernetes. A node whose name is an IP address has that address. A
	// kubelet refuses a loopback address that it gets in any other way.
	Address string
	cluster *Cluster
}

// The names of the processes, which their records and log files have too.
const (
	etcdProcess      = "etcd"
	apiServerProcess = "kube-apiserver"
	kubeletProcess   = "kubelet"
)

// The ports differ from those of a real cluster, which may listen on all addresses of this machine.
const (
	etcdPort          = 22379
	etcdPeerPort      = 22380
	apiServerPort     = 26443
	kubeletPort       = 20250
	kubeletHealthPort = 20248
	metricsPort       = 20249
)

const (
	readyTimeout = 2 * time.Minute // for each process, on a machine that is busy with other tests
	stopGrace    = 15 * time.Second
)

// Start brings a cluster up and returns when all nodes are Ready. It first takes down what an earlier cluster has left in
// the folder. The caller ends the cluster with Close or releases it with Detach.
func Start(ctx context.Context, config Config) (*Cluster, error) {
	if err := Ready(); err != nil {
		return nil, err
	}
	if err := checkNoKubelet(); err != nil {
		return nil, err
	}
	if len(config.Nodes) == 0 {
		return nil, errors.New("kubernetes: a cluster needs a node")
	}
	dir, err := filepath.Abs(config.Dir)
	if err != nil {
		return nil, err
	}
	c := &Cluster{dir: dir, logf: config.Logf}
	if c.logf == nil {
		c.logf = func(string, ...any) {}
	}
	// Includes nodes that this cluster does not have.
	if err := Cleanup(dir, c.logf); err != nil {
		return nil, err
	}
	if err := c.start(ctx, config); err != nil {
		return nil, errors.Join(fmt.Errorf("start a cluster in %s: %w", dir, err), c.Close())
	}
	return c, nil
}

func (c *Cluster) start(ctx context.Context, config Config) error {
	for i, nodeConfig := range config.Nodes {
		made := &Node{Address: c.address(10 + i), cluster: c}
		var err error
		made.Node, err = node.Start(ctx, node.Config{
			Dir: filepath.Join(c.dir, nodeConfig.Name), Name: fmt.Sprintf("%s-%05x", nodeConfig.Name, hash(c.dir)&0xfffff),
			Streamshim: nodeConfig.Streamshim, StreamshimArgs: []string{"--metrics-address", made.metricsAddress()},
			Logf: c.logf,
		})
		if err != nil {
			return err
		}
		c.nodes = append(c.nodes, made)
	}
	if err := c.writeCertificates(); err != nil {
		return err
	}
	var err error
	if c.client, err = c.httpClient(); err != nil {
		return err
	}
	if err := c.startEtcd(); err != nil {
		return err
	}
	if err := c.StartAPIServer(ctx, true); err != nil {
		return err
	}
	for _, n := range c.nodes {
		if err := n.StartKubelet(ctx, true); err != nil {
			return err
		}
	}
	for _, n := range c.nodes {
		if err := n.WaitReady(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Close takes the cluster down. Only logs stay in its folder.
func (c *Cluster) Close() error {
	var errs []error
	for i := len(c.nodes) - 1; i >= 0; i-- { // the first one has the control plane
		errs = append(errs, c.nodes[i].Close())
	}
	if c.client != nil {
		c.client.CloseIdleConnections()
	}
	http.DefaultClient.CloseIdleConnections()
	c.nodes = nil
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return removeFiles(c.dir)
}

// Detach releases the cluster but leaves it running. Cleanup ends it.
func (c *Cluster) Detach() {
	for _, n := range c.nodes {
		n.Detach()
	}
	c.client.CloseIdleConnections()
	c.nodes = nil
}

// Cleanup takes down what a dead owner has left in the folder, or a cluster that was released with Detach. A folder without
// a cluster is no error. Logs stay.
func Cleanup(dir string, logf func(string, ...any)) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	records, err := filepath.Glob(filepath.Join(dir, "*", "node.json"))
	if err != nil {
		return err
	}
	var errs []error
	for _, record := range records {
		errs = append(errs, node.Cleanup(filepath.Dir(record), logf))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return removeFiles(dir)
}

// removeFiles removes what is outside the nodes' folders.
func removeFiles(dir string) error {
	errs := []error{removeTraces(dir)}
	for _, name := range []string{"pki", "home", "kubeconfig"} {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, name)))
	}
	return errors.Join(errs...)
}

// Node returns the node with this name in the configuration.
func (c *Cluster) Node(name string) *Node {
	for _, n := range c.nodes {
		if filepath.Base(n.Dir()) == name {
			return n
		}
	}
	return nil
}

// StopAPIServer ends the API server. Pods go on. Streaming sessions through it end.
func (c *Cluster) StopAPIServer() error { return c.nodes[0].StopCompanion(apiServerProcess, stopGrace) }

// StartAPIServer starts the API server and waits until it is ready. The feature gate is ExtendWebSocketsToKubelet.
func (c *Cluster) StartAPIServer(ctx context.Context, extendWebSocketsToKubelet bool) error {
	n := c.nodes[0]
	if err := n.StartCompanion(apiServerProcess, n.Program("kube-apiserver"), c.apiServerArguments(extendWebSocketsToKubelet)...); err != nil {
		return err
	}
	return n.waitFor(ctx, apiServerProcess, func(ctx context.Context) error {
		if _, err := c.Get(ctx, "/readyz"); err != nil {
			return err
		}
		_, err := c.Get(ctx, "/api/v1/namespaces/default")
		return err
	})
}

func (c *Cluster) startEtcd() error {
	n := c.nodes[0]
	client := fmt.Sprintf("http://%s:%d", c.address(1), etcdPort)
	peer := fmt.Sprintf("http://%s:%d", c.address(1), etcdPeerPort)
	return n.StartCompanion(etcdProcess, n.Program("etcd"), "--name", "test", "--data-dir", filepath.Join(n.Dir(), "etcd"),
		"--unsafe-no-fsync", "--log-level", "warn",
		"--listen-client-urls", client, "--advertise-client-urls", client,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "test="+peer)
}

// StopKubelet ends the kubelet. Containers go on.
func (n *Node) StopKubelet() error { return n.StopCompanion(kubeletProcess, stopGrace) }

// StartKubelet starts the kubelet and waits until it is healthy, which is some seconds before its node is Ready. The
// feature gate is ExtendWebSocketsToKubelet.
func (n *Node) StartKubelet(ctx context.Context, extendWebSocketsToKubelet bool) error {
	if err := n.makeCgroupRoot(); err != nil {
		return err
	}
	arguments, err := n.kubeletArguments(extendWebSocketsToKubelet)
	if err != nil {
		return err
	}
	if err := n.StartCompanion(kubeletProcess, n.Program("kubelet"), arguments...); err != nil {
		return err
	}
	return n.waitFor(ctx, kubeletProcess, func(ctx context.Context) error {
		_, err := get(ctx, http.DefaultClient, fmt.Sprintf("http://%s:%d/healthz", n.Address, kubeletHealthPort))
		return err
	})
}

// WaitReady waits until the API server shows the node as Ready. A kubelet that was restarted may not have reported its
// status yet.
func (n *Node) WaitReady(ctx context.Context) error {
	return n.waitFor(ctx, kubeletProcess, func(ctx context.Context) error {
		ready, _, err := n.Condition(ctx)
		if err == nil && !ready {
			err = errors.New("the node is not Ready yet")
		}
		return err
	})
}

// Condition returns whether the node is Ready, and since when that has not changed.
func (n *Node) Condition(ctx context.Context) (ready bool, since time.Time, err error) {
	text, err := n.cluster.Get(ctx, "/api/v1/nodes/"+n.Address)
	if err != nil {
		return false, time.Time{}, err
	}
	var object struct {
		Status struct {
			Conditions []struct {
				Type, Status       string
				LastTransitionTime time.Time
			}
		}
	}
	if err := json.Unmarshal(text, &object); err != nil {
		return false, time.Time{}, err
	}
	for _, condition := range object.Status.Conditions {
		if condition.Type == "Ready" {
			return condition.Status == "True", condition.LastTransitionTime, nil
		}
	}
	return false, time.Time{}, errors.New("the node has no condition Ready yet")
}

// Metrics returns streamshim's metrics as text.
func (n *Node) Metrics(ctx context.Context) (string, error) {
	text, err := get(ctx, http.DefaultClient, "http://"+n.metricsAddress()+"/metrics")
	return string(text), err
}

func (n *Node) metricsAddress() string { return fmt.Sprintf("%s:%d", n.Address, metricsPort) }

// Get reads from the API server as the administrator.
func (c *Cluster) Get(ctx context.Context, path string) ([]byte, error) {
	return get(ctx, c.client, fmt.Sprintf("https://%s:%d%s", c.address(1), apiServerPort, path))
}

func get(ctx context.Context, client *http.Client, url string) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	response, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer func() { _ = response.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(response.Body, 16<<20))
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s: %.200s", url, response.Status, text)
	}
	return text, err
}

// waitFor calls ask until it succeeds, the process has ended, or the time is up. The node must have a record of the
// process.
func (n *Node) waitFor(ctx context.Context, process string, ask func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	retry := time.NewTicker(100 * time.Millisecond)
	defer retry.Stop()
	for {
		attempt, cancelAttempt := context.WithTimeout(ctx, 5*time.Second)
		err := ask(attempt)
		cancelAttempt()
		if err == nil {
			return nil
		}
		if n.PID(process) == 0 {
			return fmt.Errorf("%s has ended; see its log %s", process, n.LogPath(process))
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w; see its log %s", process, err, n.LogPath(process))
		case <-retry.C:
		}
	}
}

func (c *Cluster) path(name string) string { return filepath.Join(c.dir, name) }

// address returns a loopback IPv4 address of this cluster with this last byte.
func (c *Cluster) address(last int) string {
	h := hash(c.dir)
	return fmt.Sprintf("127.%d.%d.%d", 64+h%128, h/128%256, last)
}

func hash(s string) uint32 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(s)) // never fails
	return h.Sum32()
}
