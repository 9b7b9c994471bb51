package images

import (
	"io/fs"
	"runtime"
)

// Repositories and references that callers name. The caller chooses the host before them.
const (
	// Sandbox is the image of pod sandboxes. It is not critest's pause:3.9, because the image specs remove that one and
	// count its tags.
	Sandbox = "pause:sandbox"
	// Busybox is a plain busybox system whose command is sh.
	Busybox = "busybox:latest"
	// Lab is busybox with a main process that serves HTTP on port 80 and answers every line on its
	// stdin with "you said: <line>" on its stdout.
	Lab = "lab:latest"
	// CritestDigest is the image that critest pulls by a digest compiled into it.
	CritestDigest = "k8s-staging-cri-tools/test-image-digest:latest"
)

// catalogue lists every image: those of critest v1.36.0 (named in pkg/common and pkg/validate), the sandbox's and the
// lab's.
func catalogue(base *layer, actor []byte) []definition {
	const e2e, cri = "e2e-test-images/", "k8s-staging-cri-tools/"
	shell := imageConfig{Cmd: []string{"sh"}}
	pause := imageConfig{Entrypoint: []string{"/pause"}}
	nginx := imageConfig{Entrypoint: []string{"/usr/sbin/nginx"}, Cmd: []string{"-g", "daemon off;"}}
	nginxOfHostNetwork := nginx
	nginxOfHostNetwork.Env = []string{searchPath, "LISTEN=:12003"}

	pauseProgram := newLayer(program("pause", actor))
	nginxProgram := newLayer(program("usr/sbin/nginx", actor))
	runAs := func(user string) imageConfig { return imageConfig{Cmd: []string{"sh"}, User: user} }
	// marked gives an image its own content.
	marked := func(mark string, references ...string) definition {
		return definition{references, shell, []*layer{base, newLayer(text("test-image.txt", mark))}}
	}

	return []definition{
		{[]string{Busybox, e2e + "busybox:1.29-2"}, shell, []*layer{base}},
		{[]string{Lab}, imageConfig{Entrypoint: []string{"/usr/sbin/lab"}}, []*layer{base, newLayer(program("usr/sbin/lab", actor))}},
		{[]string{Sandbox}, pause, []*layer{pauseProgram}},

		{[]string{"pause:3.9"}, pause, []*layer{pauseProgram}},
		{[]string{e2e + "nginx:1.14-2"}, nginx, []*layer{base, nginxProgram}},
		{[]string{cri + "hostnet-nginx-" + runtime.GOARCH}, nginxOfHostNetwork, []*layer{base, nginxProgram}},
		{[]string{e2e + "httpd:2.4.39-4"}, imageConfig{Cmd: []string{"/usr/sbin/httpd"}}, []*layer{base, newLayer(program("usr/sbin/httpd", actor))}},
		{[]string{e2e + "nonewprivs:1.3"}, imageConfig{Entrypoint: []string{"/nnp"}}, []*layer{base, newLayer(file{path: "nnp", mode: fs.ModeSetuid | 0o755, data: actor})}},

		{[]string{cri + "test-image-user-uid"}, runAs("1002"), []*layer{base}},
		{[]string{cri + "test-image-user-username"}, runAs("www-data"), []*layer{base}},
		{[]string{cri + "test-image-user-uid-group"}, runAs("1003:users"), []*layer{base}},
		{[]string{cri + "test-image-user-username-group"}, runAs("www-data:100"), []*layer{base}},
		{[]string{cri + "test-image-predefined-group"}, runAs("1000"), []*layer{base, newLayer(
			text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\ndefault-user:x:1000:1000::/home/default-user:/bin/sh\n"),
			text("etc/group", "root:x:0:\ndefault-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n"),
			folder("home/default-user"),
		)}},

		marked("latest", cri+"test-image-latest"),
		marked("tag", cri+"test-image-tag:test"),
		marked("all", cri+"test-image-tag:all"),
		marked("tags", cri+"test-image-tags:1", cri+"test-image-tags:2", cri+"test-image-tags:3"),
		marked("1", cri+"test-image-1"),
		marked("2", cri+"test-image-2"),
		marked("3", cri+"test-image-3"),
		marked("digest", CritestDigest),
	}
}
