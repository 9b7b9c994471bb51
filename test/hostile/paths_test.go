package hostile

import "fmt"

// namespacePath is the path of a namespace of the container's main process.
func namespacePath(c *container, name string) string {
	return fmt.Sprintf("/proc/%d/ns/%s", c.InitPid, name)
}
