package kubernetes

import (
	"fmt"

	"github.com/streamshim/streamshim/test/internal/images"
	"github.com/streamshim/streamshim/test/internal/node"
)

// LabPod returns the manifest of the pod "lab", which serves what the lab shows. It names its node, because a cluster may
// have no scheduler.
func LabPod(nodeName string) string { return fmt.Sprintf(labPod, nodeName, node.Image(images.Lab)) }

const labPod = `
apiVersion: v1
kind: Pod
metadata: {name: lab}
spec:
  nodeName: %s
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: 1
  dnsPolicy: Default
  containers:
  - {name: main, image: %q, imagePullPolicy: IfNotPresent, stdin: true}
`
