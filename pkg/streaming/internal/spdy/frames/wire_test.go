package frames

import (
	"bytes"
	"compress/zlib"
	"encoding/hex"
	"errors"
	"hash/adler32"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/streamshim/streamshim/internal/testutil"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestFrameBytes(t *testing.T) {
	reply := AppendHeaderBlock(nil, true, nil)
	data := make([]byte, HeaderLen)
	PutDataHeader(data, 0x7fffffff, FlagFin, MaxLen)
	for _, tt := range []struct {
		name string
		got  []byte
		want string
	}{
		{"SYN_STREAM", AppendSynStream(nil, 1, FlagFin, []byte{0xab}), "80030001 0100000b 00000001 00000000 0000 ab"},
		{"first SYN_REPLY", AppendSynReply(nil, 1, 0, reply), "80030002 00000018 00000001 78bbe3c6a7c2 000400fbff00000000 000000ffff"},
		{"next SYN_REPLY", AppendSynReply(nil, 3, 0, EmptyHeaderBlock), "80030002 00000012 00000003 000400fbff00000000 000000ffff"},
		{"RST_STREAM", AppendRstStream(nil, 0x01020304, ResetCancel), "80030003 00000008 01020304 00000005"},
		{"SETTINGS", AppendEmptySettings(nil), "80030004 00000004 00000000"},
		{"PING", AppendPing(nil, 7), "80030006 00000004 00000007"},
		{"GOAWAY", AppendGoAway(nil, 9, GoAwayInternalError), "80030007 00000008 00000009 00000002"},
		{"DATA", data, "7fffffff 01ffffff"},
	} {
		if want := unhex(t, tt.want); !bytes.Equal(tt.got, want) {
			t.Errorf("%s:\n got %x\nwant %x", tt.name, tt.got, want)
		}
	}
	if !bytes.Equal(EmptyHeaderBlock, AppendHeaderBlock(nil, false, nil)) {
		t.Error("emptyHeaderBlock is not what AppendHeaderBlock gives for no headers")
	}
}

func TestParseFrameHeader(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want Header
	}{
		{"80030001 0100000b", Header{Control: true, Version: 3, Kind: 1, Flags: 1, Length: 11}},
		{"ffffffff ffffffff", Header{Control: true, Version: 0x7fff, Kind: 0xffff, Flags: 0xff, Length: MaxLen}},
		{"00000001 00000000", Header{StreamID: 1}},
		{"7fffffff 01008000", Header{StreamID: MaxStreamID, Flags: FlagFin, Length: 32 << 10}},
	} {
		if got := ParseHeader(unhex(t, tt.in)); got != tt.want {
			t.Errorf("%s: got %+v, want %+v", tt.in, got, tt.want)
		}
	}
}

// TestParsePayloads checks that each kind accepts its own form and refuses every other length.
func TestParsePayloads(t *testing.T) {
	for _, tt := range []struct {
		name    string
		parse   func([]byte) (any, error)
		in      string
		want    any
		lengths func(int) bool
	}{
		{"SYN_STREAM", func(b []byte) (any, error) { id, block, err := ParseSynStream(b); return []any{id, len(block)}, err },
			"80000005 00000000 0000 aabb", []any{uint32(5), 2}, func(n int) bool { return n >= 10 }},
		{"SYN_REPLY", func(b []byte) (any, error) {
			id, block, err := ParseReplyOrHeaders(b)
			return []any{id, len(block)}, err
		},
			"00000005 aa", []any{uint32(5), 1}, func(n int) bool { return n >= 4 }},
		{"RST_STREAM", func(b []byte) (any, error) { id, status, err := ParseRstStream(b); return []any{id, status}, err },
			"ffffffff 00000003", []any{uint32(MaxStreamID), ResetRefusedStream}, func(n int) bool { return n == 8 }},
		{"SETTINGS", func(b []byte) (any, error) { return nil, CheckSettings(b) },
			"00000001 0000000000000000", nil, func(n int) bool { return n == 12 }},
		{"PING", func(b []byte) (any, error) { return ParsePing(b) },
			"00000007", uint32(7), func(n int) bool { return n == 4 }},
		{"GOAWAY", func(b []byte) (any, error) { id, status, err := ParseGoAway(b); return []any{id, status}, err },
			"00000007 00000002", []any{uint32(7), GoAwayInternalError}, func(n int) bool { return n == 8 }},
		{"WINDOW_UPDATE", func(b []byte) (any, error) { return nil, CheckWindowUpdate(b) },
			"00000007 00000002", nil, func(n int) bool { return n == 8 }},
	} {
		in := unhex(t, tt.in)
		if got, err := tt.parse(in); err != nil || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: got %v, %v, want %v", tt.name, got, err, tt.want)
		}
		padded := append(in, make([]byte, 20)...)
		for n := range len(padded) {
			_, err := tt.parse(padded[:n])
			if (err == nil) != tt.lengths(n) {
				t.Errorf("%s of %d bytes: %v", tt.name, n, err)
			}
		}
	}
	// CVE-2026-35469: the count promises more entries than there are.
	if err := CheckSettings(unhex(t, "ffffffff 00000000 00000000")); err == nil {
		t.Error("SETTINGS with 4294967295 entries in 8 bytes was taken")
	}
}

func TestDictionary(t *testing.T) {
	if got := adler32.Checksum(Dictionary); got != dictionaryID || len(Dictionary) != 1423 {
		t.Errorf("got %#x, %d bytes", got, len(Dictionary))
	}
}

var testLimits = HeaderLimits{Count: 8, Field: 100, Total: 500}

func TestHeaderBlockBytes(t *testing.T) {
	got := AppendHeaderBlock(nil, true, http.Header{"Streamtype": {"data"}, "Port": {"80", "81"}})
	want := unhex(t, "78bbe3c6a7c2"+
		"00 2b00 d4ff"+
		"00000002"+
		"00000004 706f7274 00000005 3830003831"+
		"0000000a 73747265616d74797065 00000004 64617461"+
		"00 0000 ffff")
	if !bytes.Equal(got, want) {
		t.Errorf("\n got %x\nwant %x", got, want)
	}
}

// plainBlock returns a header block of raw pairs, which may be invalid.
func plainBlock(first bool, count uint32, pairs ...string) []byte {
	plain := []byte{byte(count >> 24), byte(count >> 16), byte(count >> 8), byte(count)}
	for _, s := range pairs {
		plain = append(plain, byte(len(s)>>24), byte(len(s)>>16), byte(len(s)>>8), byte(len(s)))
		plain = append(plain, s...)
	}
	var b []byte
	if first {
		b = append(b, zlibHeader...)
	}
	b = append(b, 0, byte(len(plain)), byte(len(plain)>>8), ^byte(len(plain)), ^byte(len(plain)>>8))
	b = append(b, plain...)
	return append(b, syncFlush...)
}

func TestHeaderReader(t *testing.T) {
	good := plainBlock(true, 1, "name", "value")
	for _, tt := range []struct {
		name  string
		block []byte
		want  http.Header // nil: an error
		fault bool        // it ends only the stream
	}{
		{"one", good, http.Header{"Name": {"value"}}, false},
		{"none", plainBlock(true, 0), http.Header{}, false},
		{"several values", plainBlock(true, 1, "a", "x\x00y"), http.Header{"A": {"x", "y"}}, false},
		{"empty value", plainBlock(true, 1, "a", ""), http.Header{"A": {""}}, false},
		{"truncated", good[:20], nil, false},
		{"empty", nil, nil, false},
		{"no zlib", append([]byte{0x00, 0x00}, good[2:]...), nil, false},
		{"other Dictionary", append([]byte{0x78, 0xbb, 1, 2, 3, 4}, good[6:]...), nil, false},
		{"upper case", plainBlock(true, 1, "Name", "v"), nil, true},
		{"empty name", plainBlock(true, 1, "", "v"), nil, true},
		{"twice", plainBlock(true, 2, "a", "1", "a", "2"), nil, true},
		{"too many", plainBlock(true, 9, strings.Split("a,1,b,1,c,1,d,1,e,1,f,1,g,1,h,1,i,1", ",")...), nil, false},
		{"many promised", plainBlock(true, 0xffffffff), nil, false},
		{"long name", plainBlock(true, 1, strings.Repeat("n", 101), "v"), nil, false},
		{"long value", plainBlock(true, 1, "n", strings.Repeat("v", 101)), nil, false},
		{"long in all", plainBlock(true, 6, "a", strings.Repeat("v", 99), "b", strings.Repeat("v", 99), "c", strings.Repeat("v", 99),
			"d", strings.Repeat("v", 99), "e", strings.Repeat("v", 99), "f", "1"), nil, false},
		{"more behind", append(bytes.Clone(good), make([]byte, maxLeftover+1)...), nil, false},
	} {
		r := TakeHeaderReader()
		got, err := r.Read(tt.block, testLimits)
		if tt.want != nil && (err != nil || !reflect.DeepEqual(got, tt.want)) {
			t.Errorf("%s: got %v, %v", tt.name, got, err)
		}
		if tt.want == nil && (err == nil || IsHeaderFault(err) != tt.fault) {
			t.Errorf("%s: got %v, %v", tt.name, got, err)
		}
		// A fault of the content leaves the zlib stream usable. Any other fault does not.
		next, err := r.Read(plainBlock(false, 1, "next", "one"), testLimits)
		if usable := tt.want != nil || tt.fault; usable != (err == nil && next.Get("next") == "one") {
			t.Errorf("%s: the next block: %v, %v", tt.name, next, err)
		}
		r.Release()
	}
}

// TestHeaderReaderBomb sends 16 MiB compressed to 16 KiB.
func TestHeaderReaderBomb(t *testing.T) {
	testutil.Slow(t)
	var bomb bytes.Buffer
	w, err := zlib.NewWriterLevelDict(&bomb, zlib.BestCompression, Dictionary)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(AppendHeaderPairs(nil, http.Header{"x": {strings.Repeat("x", 16<<20)}}))
	w.Flush()

	r := TakeHeaderReader()
	defer r.Release()
	limits := HeaderLimits{Count: 8, Field: 1 << 30, Total: 64 << 10}
	if _, err := r.Read(bomb.Bytes(), limits); err == nil || !strings.Contains(err.Error(), "inflates to more") {
		t.Errorf("%d bytes that inflate to 16 MiB: %v", bomb.Len(), err)
	}
	if _, err := r.Read(plainBlock(false, 0), limits); !errors.Is(err, errInflaterBroken) {
		t.Errorf("after a broken block: %v", err)
	}
}

// TestHistoryStays checks that the result of History does not change when the reader's memory serves the next connection.
func TestHistoryStays(t *testing.T) {
	limits := HeaderLimits{Count: 10, Field: 1 << 10, Total: 1 << 12}
	var peer PeerHeaders
	peer.Limits = limits
	if _, _, err := peer.Read(AppendHeaderBlock(nil, true, http.Header{"Name": {"first"}})); err != nil {
		t.Fatal(err)
	}
	history, err := peer.History()
	if err != nil {
		t.Fatal(err)
	}
	kept := slices.Clone(history)
	reader := peer.reader
	peer.Refuse()
	if _, err := reader.Read(AppendHeaderBlock(nil, true, http.Header{"Name": {"other"}}), limits); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(history, kept) {
		t.Error("the next connection has changed the history")
	}
	var resumed PeerHeaders
	resumed.Limits = limits
	resumed.Resume(history)
	header, refused, err := resumed.Read(AppendHeaderBlock(nil, false, http.Header{"Name": {"second"}}))
	if err != nil || refused || header.Get("name") != "second" {
		t.Errorf("after the hand-over: %v, refused %v, %v", header, refused, err)
	}
	resumed.Refuse()
	if _, refused, err := resumed.Read([]byte("anything")); err != nil || !refused || !resumed.Refuses() {
		t.Errorf("after Refuse: refused %v, %v", refused, err)
	}
}
