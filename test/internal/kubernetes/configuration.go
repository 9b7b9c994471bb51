package kubernetes

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

func (c *Cluster) apiServerArguments(extendWebSocketsToKubelet bool) []string {
	pki := func(name string) string { return c.path("pki/" + name) }
	return []string{
		fmt.Sprintf("--etcd-servers=http://%s:%d", c.address(1), etcdPort),
		"--bind-address=" + c.address(1), fmt.Sprintf("--secure-port=%d", apiServerPort), "--advertise-address=" + c.address(1),
		"--endpoint-reconciler-type=none", // the default refuses a loopback address
		"--tls-cert-file=" + pki("apiserver.crt"), "--tls-private-key-file=" + pki("apiserver.key"),
		"--client-ca-file=" + pki("ca.crt"), "--kubelet-certificate-authority=" + pki("ca.crt"),
		"--kubelet-client-certificate=" + pki("apiserver-kubelet.crt"), "--kubelet-client-key=" + pki("apiserver-kubelet.key"),
		"--service-account-issuer=https://streamshim.test", "--service-account-key-file=" + pki("service-accounts.key"),
		"--service-account-signing-key-file=" + pki("service-accounts.key"), "--service-cluster-ip-range=10.254.0.0/24",
		"--authorization-mode=Node,RBAC",
		// Otherwise a pod needs a service account, which only the controller-manager creates.
		"--disable-admission-plugins=ServiceAccount",
		"--allow-privileged=true", // needed by test/fleet's DaemonSet
		fmt.Sprintf("--feature-gates=ExtendWebSocketsToKubelet=%t", extendWebSocketsToKubelet), "--v=2",
	}
}

// kubeletConfiguration has the settings that differ from a kubelet's defaults. With them it runs beside other kubelets, on
// loopback, with few rights, and leaves the machine as it is.
const kubeletConfiguration = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: %[1]s
port: %[2]d
readOnlyPort: 0
healthzBindAddress: %[1]s
healthzPort: %[3]d
tlsCertFile: %[4]s/pki/kubelet-server-%[1]s.crt
tlsPrivateKeyFile: %[4]s/pki/kubelet-server-%[1]s.key
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true, cacheTTL: 10s}
  x509: {clientCAFile: %[4]s/pki/ca.crt}
authorization: {mode: Webhook}
containerRuntimeEndpoint: %[5]s
podLogsDir: %[6]s/podlogs
volumePluginDir: %[6]s/volumeplugins
cgroupDriver: cgroupfs
cgroupRoot: %[7]s
failCgroupV1: false            # since 1.35 a kubelet refuses a machine with cgroup v1 otherwise
failSwapOn: false
oomScoreAdj: 0                 # -999 needs CAP_SYS_RESOURCE
makeIPTablesUtilChains: false
resolvConf: ""
localStorageCapacityIsolation: false
enforceNodeAllocatable: ["none"]
nodeStatusUpdateFrequency: 3s
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {memory.available: "1Mi", nodefs.available: "0%%", nodefs.inodesFree: "0%%", imagefs.available: "0%%"}
featureGates: {ExtendWebSocketsToKubelet: %[8]t}
`

// kubeletArguments writes the kubelet's configuration and returns its arguments.
func (n *Node) kubeletArguments(extendWebSocketsToKubelet bool) ([]string, error) {
	text := fmt.Sprintf(kubeletConfiguration, n.Address, kubeletPort, kubeletHealthPort, n.cluster.dir, n.Socket(), n.Dir(), n.CgroupRoot(), extendWebSocketsToKubelet)
	path := filepath.Join(n.Dir(), "kubelet.yaml")
	err := errors.Join(
		os.WriteFile(path, []byte(text), 0o644),
		os.MkdirAll(filepath.Join(n.Dir(), "podlogs"), 0o755),
		os.MkdirAll(filepath.Join(n.Dir(), "volumeplugins"), 0o755),
	)
	return []string{
		"--config=" + path, "--root-dir=" + filepath.Join(n.Dir(), "kubelet"), "--cert-dir=" + filepath.Join(n.Dir(), "kubelet/pki"),
		"--kubeconfig=" + n.cluster.path("pki/kubelet-"+n.Address+".kubeconfig"), "--hostname-override=" + n.Address, "--v=2",
	}, err
}

// makeCgroupRoot creates the parent of the kubelet's pods' cgroups, in every hierarchy: the kubelet needs it to exist. The
// node's Close removes it.
func (n *Node) makeCgroupRoot() error {
	table, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(table)) {
		fields := strings.Fields(line)
		if len(fields) < 3 || fields[2] != "cgroup" && fields[2] != "cgroup2" {
			continue
		}
		hierarchy := fields[1]
		if err := os.Mkdir(filepath.Join(hierarchy, n.CgroupRoot()), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			if errors.Is(err, unix.EROFS) {
				continue
			}
			return err
		}
		if fields[2] == "cgroup2" {
			if err := delegateControllers(hierarchy); err != nil {
				return err
			}
		}
	}
	return nil
}

// delegateControllers enables in the groups below the top of a cgroup v2 hierarchy the controllers of the top.
func delegateControllers(hierarchy string) error {
	controllers, err := os.ReadFile(filepath.Join(hierarchy, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for _, controller := range strings.Fields(string(controllers)) {
		if err := os.WriteFile(filepath.Join(hierarchy, "cgroup.subtree_control"), []byte("+"+controller), 0o644); err != nil {
			return fmt.Errorf("delegate the cgroup controller %s: %w", controller, err)
		}
	}
	return nil
}
