package relay

import (
	"reflect"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/streaming/buffers"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
	"github.com/streamshim/streamshim/pkg/streaming/internal/status"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
)

// frozenState returns the state of a relay with something in each field. Nothing was sent on its connection.
func frozenState(t testing.TB, files *handover.Files) relayState {
	t.Helper()
	_, network := testutil.TCPPair(t)
	conn := spdy.NewClient(network, nil, spdy.Config{})
	var ids [5]uint32
	for i := range ids {
		stream, err := conn.OpenStream(nil)
		if err != nil {
			t.Fatal(err)
		}
		ids[i] = stream.ID()
	}
	conn.Freeze()
	frozen, err := transport.Streams{Conn: conn}.State(files)
	if err != nil {
		t.Fatal(err)
	}
	state := relayState{
		Version: stateVersion, Conn: frozen, Stdin: ids[0], Resize: ids[1], Failure: ids[2], JSONStatus: true, Grace: time.Second,
		Stdout:     &outputState{ids[3], &skipState{100, "\r\n", []byte("output"), 3, true}},
		Stderr:     &outputState{ids[4], &skipState{200, "\n", []byte("more"), 4, true}},
		LastOutput: 1, Detaching: 2, Detached: true, Message: []byte(" "), Result: status.InternalError("x"),
	}
	for i, v := 0, reflect.ValueOf(state); i < v.NumField(); i++ {
		if v.Field(i).IsZero() {
			t.Errorf("%s is empty in the state of the test", v.Type().Field(i).Name)
		}
	}
	return state
}

// TestEachFieldOfTheState checks that what is in a relay's state is there again when the relay is frozen again.
func TestEachFieldOfTheState(t *testing.T) {
	leak.Check(t)
	files := handover.NewFiles()
	defer files.Close()
	state := frozenState(t, files)
	encoded, err := handover.Encode(state)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Resume(encoded, files, buffers.New(1<<20).Share(), rescue.Die)
	if err != nil {
		t.Fatal(err)
	}
	if encoded, err = r.Freeze(files); err != nil {
		t.Fatal(err)
	}
	var again relayState
	if err := handover.Decode(encoded, &again); err != nil {
		t.Fatal(err)
	}
	again.Conn = state.Conn
	if !reflect.DeepEqual(state, again) {
		t.Errorf("was %+v and is %+v", state, again)
	}
}

func FuzzState(f *testing.F) {
	files := handover.NewFiles()
	defer files.Close()
	encoded, err := handover.Encode(frozenState(f, files))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(encoded)
	f.Fuzz(func(_ *testing.T, encoded []byte) {
		files := handover.NewFiles()
		defer files.Close()
		if relay, err := Resume(encoded, files, buffers.New(1<<20).Share(), rescue.Die); err == nil {
			relay.Close()
		}
	})
}
