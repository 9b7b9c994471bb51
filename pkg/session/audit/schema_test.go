package audit

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// The schema and the table in docs/audit.md have the fields that records have, with their types.
func TestSchema(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "..", "docs", "audit.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "As JSON Schema")
	_, rest, _ = strings.Cut(rest, "```json\n")
	block, _, _ := strings.Cut(rest, "```")
	var schema struct {
		Required   []string
		Properties map[string]struct {
			Type string
			Enum []string
		}
	}
	if err := json.Unmarshal([]byte(block), &schema); err != nil {
		t.Fatalf("the schema: %v", err)
	}
	types := map[reflect.Kind]string{
		reflect.String: "string", reflect.Bool: "boolean", reflect.Int: "integer", reflect.Int64: "integer",
		reflect.Float64: "number", reflect.Slice: "array", reflect.Struct: "object",
	}
	fields := reflect.VisibleFields(reflect.TypeFor[Record]())
	for _, field := range fields {
		name, options, _ := strings.Cut(field.Tag.Get("json"), ",")
		property, ok := schema.Properties[name]
		if !ok {
			t.Errorf("the schema lacks %s", name)
			continue
		}
		kind := field.Type
		if kind.Kind() == reflect.Pointer {
			kind = kind.Elem()
		}
		want := types[kind.Kind()]
		if name == "time" {
			want = "string"
		}
		if property.Type != want && property.Type != "" { // version and enumerations have none
			t.Errorf("%s is of type %q in the schema, and is of type %q", name, property.Type, want)
		}
		if required := slices.Contains(schema.Required, name); required == strings.Contains(options, "omitempty") {
			t.Errorf("%s is required: %v", name, required)
		}
		if !strings.Contains(string(text), "`"+name+"`") {
			t.Errorf("the table lacks %s", name)
		}
	}
	if len(fields) != len(schema.Properties) {
		t.Errorf("the schema has %d fields, records have %d", len(schema.Properties), len(fields))
	}
	for _, event := range []Event{Start, End, Refused, Lost, Handover} {
		if !slices.Contains(schema.Properties["event"].Enum, string(event)) {
			t.Errorf("the schema lacks the event %s", event)
		}
	}
}
