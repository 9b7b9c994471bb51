package main

import (
	"bytes"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
)

func TestPartOf(t *testing.T) {
	for name, want := range map[string]string{
		"/pause":          "pause",
		"/usr/sbin/nginx": "nginx",
		"nginx: master process nginx -g daemon off;": nginxTitle,
		"pgrep": "pgrep",
	} {
		if got := partOf(name); got != want {
			t.Errorf("partOf(%q) = %q, want %q", name, got, want)
		}
	}
}

func TestUnknownPart(t *testing.T) {
	if err := play("somebody", nil); err == nil {
		t.Error("an unknown part was played")
	}
}

func TestPrintProcesses(t *testing.T) {
	var out bytes.Buffer
	if err := printProcesses(&out, "no process has this name"); !errors.Is(err, errNoMatch) || out.Len() > 0 {
		t.Errorf("got %v and %q", err, out.String())
	}
	name, err := os.ReadFile("/proc/1/comm")
	if err != nil {
		t.Skip(err)
	}
	if err := printProcesses(&out, strings.TrimSpace(string(name))); err != nil || !strings.Contains("\n"+out.String(), "\n1\n") {
		t.Errorf("got %v and %q", err, out.String())
	}
}

func TestPrintSharedMemory(t *testing.T) {
	var out bytes.Buffer
	if err := printSharedMemory(&out); err != nil || !strings.Contains(out.String(), "shmid") {
		t.Errorf("got %v and %q", err, out.String())
	}
}

func TestHandler(t *testing.T) {
	recorder := httptest.NewRecorder()
	handler("page").ServeHTTP(recorder, httptest.NewRequest(http.MethodGet, "/", nil))
	if recorder.Code != http.StatusOK || recorder.Body.String() != "page" {
		t.Errorf("%d %q", recorder.Code, recorder.Body.String())
	}
}
