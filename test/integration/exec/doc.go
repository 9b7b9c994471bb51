// Package symptoms holds the complaints that users of exec, attach and ExecSync have repeated for
// years, one test for each, named after what the user sees. Everything in it is real: a containerd of
// our own, runc, streamshim as a program, stock client-go over SPDY and WebSocket (v5), directly and
// behind the upgrade proxies of kubelet and API server, crictl.
//
// All tests share one node and run side by side, because most of their time is waiting. What belongs
// to one test is found by a mark in its processes' environment, and a test that needs another
// configuration starts a streamshim of its own in front of the same containerd.
package exec
