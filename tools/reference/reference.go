package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"reflect"
	"strings"
	"unicode"

	"github.com/pelletier/go-toml/v2"

	"github.com/streamshim/streamshim/pkg/config"
)

// key is one setting.
type key struct {
	name     string // in its table
	text     string // the comment in the code, as one paragraph
	value    string // the default as TOML; empty if there is none, as in a rule
	typeName string
	reload   bool
}

// table is one table of the file. The top level has the name "".
type table struct {
	name, text string
	list       bool // [[name]]
	keys       []key
}

// generate returns the text of each generated file by its path from the top.
func generate(source string) (map[string]string, error) {
	comments, err := readComments(source)
	if err != nil {
		return nil, err
	}
	tables, err := describe(comments)
	if err != nil {
		return nil, err
	}
	return map[string]string{
		"deploy/config.toml":             sample(tables),
		"docs/configuration.md":          markdown(tables),
		"deploy/man/streamshim-config.5": manual(tables),
	}, nil
}

// readComments returns the comment of each struct ("Exec") and each field ("Exec.Linger").
func readComments(folder string) (map[string]string, error) {
	files, err := filepath.Glob(filepath.Join(folder, "*.go"))
	if err != nil {
		return nil, err
	}
	comments := make(map[string]string)
	for _, name := range files {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			return nil, err
		}
		for _, declaration := range file.Decls {
			general, ok := declaration.(*ast.GenDecl)
			if !ok {
				continue
			}
			for _, spec := range general.Specs {
				named, ok := spec.(*ast.TypeSpec)
				if !ok {
					continue
				}
				comments[named.Name.Name] = sentence(named.Name.Name, general.Doc.Text())
				structure, ok := named.Type.(*ast.StructType)
				if !ok {
					continue
				}
				for _, field := range structure.Fields.List {
					for _, fieldName := range field.Names {
						text := field.Doc.Text()
						if text == "" {
							text = field.Comment.Text()
						}
						comments[named.Name.Name+"."+fieldName.Name] = sentence(fieldName.Name, text)
					}
				}
			}
		}
	}
	return comments, nil
}

// sentence turns "Listen is the socket" into "The socket.", on one line.
func sentence(name, comment string) string {
	text := strings.Join(strings.Fields(comment), " ")
	if rest, ok := strings.CutPrefix(text, name+" "); ok {
		text = strings.TrimPrefix(rest, "is ")
	}
	if text == "" {
		return ""
	}
	first, _, _ := strings.Cut(text, " ")
	if runes := []rune(text); !strings.HasSuffix(first, ",") && !strings.HasPrefix(text, first+" or ") { // not a list of values
		runes[0] = unicode.ToUpper(runes[0])
		text = string(runes)
	}
	return strings.TrimSuffix(text, ".") + "."
}

// describe describes all tables: the top level first, lists last.
func describe(comments map[string]string) ([]table, error) {
	var tables, lists []table
	var walk func(name string, value reflect.Value) error
	walk = func(name string, value reflect.Value) error {
		current := table{name: name}
		if name != "" {
			current.text = comments[value.Type().Name()]
		}
		at := len(tables)
		tables = append(tables, current)
		for i := range value.NumField() {
			field, fieldValue := value.Type().Field(i), value.Field(i)
			if !field.IsExported() {
				continue
			}
			full := strings.TrimPrefix(name+"."+field.Tag.Get("toml"), ".")
			text := comments[value.Type().Name()+"."+field.Name]
			switch {
			case field.Type.Kind() == reflect.Struct:
				if err := walk(full, fieldValue); err != nil {
					return err
				}
				continue
			case field.Type.Kind() == reflect.Slice && field.Type.Elem().Kind() == reflect.Struct:
				list, err := describeList(full, text, field.Type.Elem(), comments)
				if err != nil {
					return err
				}
				lists = append(lists, list)
				continue
			}
			k, err := describeKey(full, text, field, fieldValue)
			if err != nil {
				return err
			}
			tables[at].keys = append(tables[at].keys, k)
		}
		return nil
	}
	if err := walk("", reflect.ValueOf(config.Default())); err != nil {
		return nil, err
	}
	return append(tables, lists...), nil
}

func describeKey(full, text string, field reflect.StructField, value reflect.Value) (key, error) {
	name := field.Tag.Get("toml")
	if text == "" {
		return key{}, fmt.Errorf("the key %s has no comment in pkg/config", full)
	}
	encoded, err := toml.Marshal(map[string]any{name: value.Interface()})
	if err != nil {
		return key{}, err
	}
	_, written, _ := strings.Cut(strings.TrimSpace(string(encoded)), " = ")
	return key{
		name: name, text: text, typeName: typeName(field.Type), reload: config.CanReload(full),
		value: zeroes.Replace(strings.ReplaceAll(written, "'", `"`)),
	}, nil
}

// zeroes shortens "4h0m0s" to "4h" and "10m0s" to "10m".
var zeroes = strings.NewReplacer(`h0m0s"`, `h"`, `m0s"`, `m"`)

// describeList describes a list of rules, which have no defaults.
func describeList(full, text string, of reflect.Type, comments map[string]string) (table, error) {
	list := table{name: full, text: text + " " + comments[of.Name()], list: true}
	for i := range of.NumField() {
		field := of.Field(i)
		fieldText := comments[of.Name()+"."+field.Name]
		if fieldText == "" {
			return table{}, fmt.Errorf("the key %s of %s has no comment in pkg/config", field.Name, full)
		}
		list.keys = append(list.keys, key{
			name: field.Tag.Get("toml"), text: fieldText, typeName: typeName(field.Type), reload: config.CanReload(full+"."+field.Tag.Get("toml")) || config.CanReload(full),
		})
	}
	return list, nil
}

func typeName(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[config.Duration]():
		return "duration"
	case t.Kind() == reflect.Pointer:
		return typeName(t.Elem())
	case t.Kind() == reflect.Slice:
		return "list of " + typeName(t.Elem()) + "s"
	case t.Kind() == reflect.Map:
		return "table of strings"
	case t.Kind() == reflect.Int, t.Kind() == reflect.Int64:
		return "integer"
	case t.Kind() == reflect.Float64:
		return "number"
	case t.Kind() == reflect.Bool:
		return "boolean"
	}
	return t.Kind().String()
}

// examples are an example of each kind of rule.
var examples = map[string]string{
	"recording.rule": `namespaces = ["prod-*"]
pod_labels = { "compliance" = "pci" }`,
	"deny": `namespaces = ["vault"]
kinds = ["exec", "attach"]
tty = true
message = "no shells here; see https://wiki.example.org/break-glass"`,
}

const sampleHead = `# Configuration of streamshim. Every key is here with its default, commented out. docs/configuration.md has
# the same as tables. "systemctl reload streamshim" applies the keys marked [reload]; other keys need a
# restart. "streamshim check" checks this file.
`

func sample(tables []table) string {
	var b strings.Builder
	b.WriteString(sampleHead)
	for _, t := range tables {
		if t.name != "" {
			b.WriteString("\n")
		}
		switch {
		case t.list:
			comment(&b, t.text+" For instance:")
			b.WriteString("#\n# [[" + t.name + "]]\n")
			for line := range strings.Lines(examples[t.name]) {
				b.WriteString("# " + line)
			}
			b.WriteString("\n")
			continue
		case t.name != "":
			comment(&b, t.text)
			b.WriteString("[" + t.name + "]\n")
		}
		for _, k := range t.keys {
			b.WriteString("\n")
			text := k.text
			if k.reload {
				text += " [reload]"
			}
			comment(&b, text)
			fmt.Fprintf(&b, "#%s = %s\n", k.name, k.value)
		}
	}
	return b.String()
}

// comment writes a text as comment lines of at most 100 columns.
func comment(b *strings.Builder, text string) {
	line := "#"
	for _, word := range strings.Fields(text) {
		if len(line)+1+len(word) > 100 {
			b.WriteString(line + "\n")
			line = "#"
		}
		line += " " + word
	}
	b.WriteString(line + "\n")
}

const markdownHead = `# Configuration

<!-- Written by "make generate" from the comments in pkg/config. Edit those. -->

streamshim reads ` + "`" + config.DefaultFile + "`" + `, or the file that ` + "`--config`" + ` names. Without a file all keys have their
defaults. Flags of ` + "`streamshim serve`" + ` override the file. The file is TOML; ` + "`deploy/config.toml`" + ` is a sample
with every key. A mistake is rejected with its line and what was probably meant.

A duration is written as ` + "`\"90s\"` or `\"1h30m\"`" + `. ` + "`systemctl reload streamshim`" + ` (SIGHUP) applies the keys marked *reload*
without touching live sessions. The log names other changed keys, which need a restart. If the file has a mistake, the
old configuration stays.
`

func markdown(tables []table) string {
	var b strings.Builder
	b.WriteString(markdownHead)
	for _, t := range tables {
		switch {
		case t.name == "":
			b.WriteString("\n## Top level\n\n")
		case t.list:
			fmt.Fprintf(&b, "\n## [[%s]]\n\n%s\n\n```toml\n[[%s]]\n%s\n```\n\n", t.name, t.text, t.name, examples[t.name])
		default:
			fmt.Fprintf(&b, "\n## [%s]\n\n%s\n\n", t.name, t.text)
		}
		b.WriteString("| key | type | default | reload | |\n|---|---|---|---|---|\n")
		for _, k := range t.keys {
			value, reload := "", ""
			if k.value != "" {
				value = "`" + k.value + "`" + human(k.value)
			}
			if k.reload {
				reload = "reload"
			}
			fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", k.name, k.typeName, value, reload, strings.ReplaceAll(k.text, "|", `\|`))
		}
	}
	return b.String()
}

// human returns a large multiple of a binary unit in that unit, in brackets, or "".
func human(value string) string {
	var n int64
	if _, err := fmt.Sscanf(value, "%d", &n); err != nil || fmt.Sprint(n) != value {
		return ""
	}
	for _, unit := range []struct {
		size int64
		name string
	}{{1 << 30, "GiB"}, {1 << 20, "MiB"}} {
		if n >= unit.size && n%unit.size == 0 {
			return fmt.Sprintf(" (%d %s)", n/unit.size, unit.name)
		}
	}
	return ""
}
