package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/node"
)

// nativeProcess is a second streamshim before the node's containerd, which starts
// commands itself. It ends with the node.
const nativeProcess = "streamshim-native"

func startThroughNative(ctx context.Context, n *node.Node, program string) (side, error) {
	folder := filepath.Join(n.Dir(), "through-native")
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return side{}, err
	}
	config := filepath.Join(folder, "config.toml")
	if err := os.WriteFile(config, []byte("[exec]\nengine = \"native\"\n"), 0o600); err != nil {
		return side{}, err
	}
	socket := "unix://" + filepath.Join(folder, "cri.sock")
	err := n.StartCompanion(nativeProcess, program, "serve", "--config", config, "--listen", socket, "--upstream", n.ContainerdSocket(),
		"--state-dir", filepath.Join(folder, "state"), "--admin", "", "--log-level", "info")
	if err != nil {
		return side{}, err
	}
	connection, err := grpc.NewClient(socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		return side{}, err
	}
	client := runtimeapi.NewRuntimeServiceClient(connection) // for as long as this process lives
	if _, err := client.Version(ctx, &runtimeapi.VersionRequest{}, grpc.WaitForReady(true)); err != nil {
		return side{}, fmt.Errorf("streamshim with engine native: %w", err)
	}
	return side{throughNative, client}, nil
}
