package testutil

import (
	"reflect"
	"testing"
)

// DropEachField runs a scenario once as it is, which must give no error, and once for each field of a state, those of
// structures in it included, with change setting the field to its zero value: each must be missed.
func DropEachField[T any](t *testing.T, scenario func(t *testing.T, change func(*T)) error) {
	t.Helper()
	t.Run("complete", func(t *testing.T) {
		if err := scenario(t, func(*T) {}); err != nil {
			t.Errorf("with all its fields: %v", err)
		}
	})
	for _, index := range leaves(reflect.TypeFor[T](), nil) {
		name := ""
		for i := range index {
			name += "." + reflect.TypeFor[T]().FieldByIndex(index[:i+1]).Name
		}
		t.Run("without"+name, func(t *testing.T) {
			wasSet := false
			err := scenario(t, func(state *T) {
				field := reflect.ValueOf(state).Elem().FieldByIndex(index)
				wasSet = wasSet || !field.IsZero()
				field.SetZero()
			})
			if err == nil {
				t.Errorf("nobody misses %s (it had a value: %v)", name[1:], wasSet)
			}
		})
	}
}

// leaves are the fields that are no structures themselves.
func leaves(of reflect.Type, at []int) (found [][]int) {
	for i := range of.NumField() {
		field := of.Field(i)
		index := append(append([]int(nil), at...), i)
		if !field.IsExported() {
			continue
		}
		if field.Type.Kind() == reflect.Struct && field.Type.NumField() > 0 && field.Type.Field(0).IsExported() {
			found = append(found, leaves(field.Type, index)...)
			continue
		}
		found = append(found, index)
	}
	return found
}
