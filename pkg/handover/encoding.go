package handover

import (
	"fmt"

	"github.com/fxamacker/cbor/v2"
)

// Limits of a state that is read: it comes from ourselves, but a damaged one must be an error and no more.
const (
	maxNesting  = 32
	maxElements = 1 << 20 // of one list or map
)

var encoding, decoding = func() (cbor.EncMode, cbor.DecMode) {
	// The default for times is whole seconds.
	encoding, err := cbor.EncOptions{Time: cbor.TimeRFC3339Nano, TimeTag: cbor.EncTagRequired}.EncMode()
	if err != nil {
		panic(err)
	}
	decoding, err := cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, TimeTag: cbor.DecTagOptional, IndefLength: cbor.IndefLengthForbidden,
		MaxNestedLevels: maxNesting, MaxArrayElements: maxElements, MaxMapPairs: maxElements,
	}.DecMode()
	if err != nil {
		panic(err)
	}
	return encoding, decoding
}()

// Encode writes a state as CBOR. Fields have the names that their structures give them.
func Encode(state any) ([]byte, error) {
	encoded, err := encoding.Marshal(state)
	if err != nil {
		return nil, fmt.Errorf("write the state: %w", err)
	}
	return encoded, nil
}

// Decode reads a state. Fields that it does not know are skipped, and those that the writer did not know stay as they are.
func Decode(encoded []byte, state any) error {
	if err := decoding.Unmarshal(encoded, state); err != nil {
		return fmt.Errorf("read the state: %w", err)
	}
	return nil
}
