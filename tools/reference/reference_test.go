package main

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/streamshim/streamshim/pkg/config"
)

const top = "../.."

func TestFilesAreUpToDate(t *testing.T) {
	files, err := generate(filepath.Join(top, "pkg", "config"))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range files {
		got, err := os.ReadFile(filepath.Join(top, name))
		if err != nil {
			t.Error(err)
		} else if string(got) != want {
			t.Errorf("%s is not what the code says; please run make generate", name)
		}
	}
}

// The sample as it is, and with every key switched on, is the default configuration.
func TestSampleIsTheDefault(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(top, "deploy", "config.toml"))
	if err != nil {
		t.Fatal(err)
	}
	setting := regexp.MustCompile(`(?m)^#([a-z_]+ = )`)
	on := setting.ReplaceAllString(string(text), "$1")
	if keys := len(setting.FindAllString(string(text), -1)); keys < 40 {
		t.Errorf("the sample has %d keys only", keys)
	}
	for name, content := range map[string]string{"as it is": string(text), "switched on": on} {
		if got := read(t, content); !reflect.DeepEqual(got, config.Default()) {
			t.Errorf("%s:\n%+v\nis not the default\n%+v", name, got, config.Default())
		}
	}
	// And the check can fail: a changed default is seen.
	if got := read(t, strings.Replace(on, `log_level = "info"`, `log_level = "warn"`, 1)); reflect.DeepEqual(got, config.Default()) {
		t.Error("a changed value is not seen")
	}
}

// The examples of rules are rules.
func TestExamples(t *testing.T) {
	for name, example := range examples {
		got := read(t, "[["+name+"]]\n"+example+"\n")
		if len(got.Deny)+len(got.Recording.Rule) != 1 {
			t.Errorf("the example of %s is no rule", name)
		}
	}
}

func read(t *testing.T, text string) config.Config {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c := config.Default()
	if err := c.Read(file, nil); err != nil {
		t.Fatal(err)
	}
	return c
}
