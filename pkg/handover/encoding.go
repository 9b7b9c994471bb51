package handover

import (
	"fmt"

	"github.com/fxamacker/cbor/v2"
)

// Limits for decoding. States come from streamshim itself, but a damaged one must result in an error, not in a crash.
const (
	maxNesting  = 32
	maxElements = 1 << 20 // of one list or map
)

var encoding, decoding = func() (cbor.EncMode, cbor.DecMode) {
	// By default cbor truncates times to seconds.
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

// Encode encodes a state as CBOR, a map from field names to values for each struct.
func Encode(state any) ([]byte, error) {
	encoded, err := encoding.Marshal(state)
	if err != nil {
		return nil, fmt.Errorf("write the state: %w", err)
	}
	return encoded, nil
}

// Decode decodes a state. It skips fields that the struct does not have, and leaves fields that are missing unchanged.
func Decode(encoded []byte, state any) error {
	if err := decoding.Unmarshal(encoded, state); err != nil {
		return fmt.Errorf("read the state: %w", err)
	}
	return nil
}
