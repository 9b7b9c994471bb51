package cri

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
)

// Field numbers of "repeated KeyValue envs" (KEP-6035, "CRI Primitive: ExecRequest.envs"). They are read from the
// request's bytes because the vendored cri-api may be older than the field.
const (
	execRequestEnvs     protowire.Number = 7
	execSyncRequestEnvs protowire.Number = 4

	keyValueKey   protowire.Number = 1
	keyValueValue protowire.Number = 2
)

var errWireFormat = errors.New("malformed protobuf")

// parseEnvs returns the environment variables that a request carries in the given field, as "NAME=value" in order.
// Values are literal: nothing is expanded. A name that is empty or contains "=" or NUL is an error.
func parseEnvs(request []byte, field protowire.Number) ([]string, error) {
	var envs []string
	err := eachBytesField(request, func(number protowire.Number, value []byte) error {
		if number != field {
			return nil
		}
		env, err := parseKeyValue(value)
		if err != nil {
			return fmt.Errorf("envs[%d]: %w", len(envs), err)
		}
		envs = append(envs, env)
		return nil
	})
	return envs, err
}

func parseKeyValue(message []byte) (string, error) {
	var key, value string
	err := eachBytesField(message, func(number protowire.Number, b []byte) error {
		switch number {
		case keyValueKey:
			key = string(b)
		case keyValueValue:
			value = string(b)
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	if key == "" {
		return "", errors.New("the name is empty")
	}
	for i := range len(key) {
		if key[i] == '=' || key[i] == 0 {
			return "", fmt.Errorf("%q is not a name for an environment variable", key)
		}
	}
	for i := range len(value) {
		if value[i] == 0 {
			return "", fmt.Errorf("the value of %q contains a NUL byte", key)
		}
	}
	return key + "=" + value, nil
}

// eachBytesField calls visit for every length-delimited field of a message and skips the others.
func eachBytesField(message []byte, visit func(protowire.Number, []byte) error) error {
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return errWireFormat
		}
		message = message[n:]
		if kind != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(number, kind, message); n < 0 {
				return errWireFormat
			}
			message = message[n:]
			continue
		}
		value, n := protowire.ConsumeBytes(message)
		if n < 0 {
			return errWireFormat
		}
		if err := visit(number, value); err != nil {
			return err
		}
		message = message[n:]
	}
	return nil
}
