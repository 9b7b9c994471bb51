package main

import (
	"bytes"
	"compress/zlib"
	"encoding/binary"
	"io"
	"math"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

func TestVerdicts(t *testing.T) {
	figureOf := func(id string) figure {
		for _, f := range figures {
			if f.id == id {
				return f
			}
		}
		t.Fatalf("no figure %s", id)
		return figure{}
	}
	for _, test := range []struct {
		id                  string
		theirs, ours, floor []float64
		want                bool
	}{
		{"exec.p50", []float64{20, 20}, []float64{13, 13}, nil, true},
		{"exec.p50", []float64{20, 20}, []float64{13.2, 13.2}, nil, false},
		{"exec.p50", nil, []float64{1}, nil, false}, // nothing to compare with
		{"stdout.rate", []float64{1}, []float64{2.6}, []float64{3}, true},
		{"stdout.rate", []float64{1}, []float64{2.6}, []float64{4}, false},
		{"stdout.rate", []float64{1}, []float64{2.4}, []float64{2}, false},
		{"stdout.rate", []float64{1}, []float64{2.6}, nil, false}, // the floor was not measured
		{"call.small", []float64{100}, []float64{240}, nil, true},
		{"call.small", []float64{100}, []float64{260}, nil, false},
		{"exec.p99", []float64{1}, []float64{100}, nil, true}, // no bar
	} {
		r := results{test.id: {containerd: test.theirs, streamshim: test.ours, bareCopy: test.floor}}
		if _, ok := r.verdict(figureOf(test.id)); ok != test.want {
			t.Errorf("%s: containerd %v, streamshim %v, floor %v: met %v", test.id, test.theirs, test.ours, test.floor, ok)
		}
	}
}

// Other load on the machine in one round weighs on both sides of it, and not on the ratio.
func TestRatioOfRounds(t *testing.T) {
	r := results{}
	for _, load := range []float64{1, 10, 3} {
		r.add("x", containerd, 20*load)
		r.add("x", streamshim, 10*load)
	}
	if got := r.ratio("x", streamshim, containerd); got != 0.5 {
		t.Errorf("ratio %v", got)
	}
	if got := percentile([]float64{4, 1, 3, 2}, 50); got != 2.5 {
		t.Errorf("median %v", got)
	}
	if got := percentile([]float64{4, 1, 3, 2}, 100); got != 4 {
		t.Errorf("maximum %v", got)
	}
	if !math.IsNaN(median(nil)) {
		t.Error("the median of nothing is a number")
	}
}

func TestReport(t *testing.T) {
	b := &bench{results: results{}}
	b.results.add("exec.p50", containerd, 20)
	b.results.add("exec.p50", streamshim, 19)
	b.results.add("call.small", containerd, 100)
	b.results.add("call.small", streamshim, 200)
	table := b.table()
	for _, want := range []string{"| exec round trip, p50 | ms | 20.0 | 19.0 | 0.95 |", "**missed**", "| +100 |", "| met |"} {
		if !strings.Contains(table, want) {
			t.Errorf("no %q in\n%s", want, table)
		}
	}
	if plot := b.plot(); !strings.Contains(plot, "exec round trip, p50") || strings.Contains(plot, "NaN") {
		t.Errorf("plot:\n%s", plot)
	}
}

// pair is a client and the server's end of its connection.
func pair(t *testing.T) (*connection, net.Conn) {
	t.Helper()
	client, server, err := tcpPair()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.FileConn(server)
	if err != nil {
		t.Fatal(err)
	}
	server.Close()
	t.Cleanup(func() { client.Close(); conn.Close() })
	if err := client.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	return &connection{Conn: client, next: 1}, conn
}

func TestReadFrames(t *testing.T) {
	c, server := pair(t)
	var wire []byte
	wire = appendData(wire, 1, false, []byte("hello"))
	wire = append(wire, 0x80, 3, 0, typePing, 0, 0, 0, 4, 0, 0, 0, 2) // is answered
	wire = append(wire, 0x80, 3, 0, typeSynReply, 0, 0, 0, 4, 0, 0, 0, 1)
	wire = appendData(wire, 1, true, nil)
	wire = append(wire, 0x80, 3, 0, typeRstStream, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 5)
	wire = append(wire, 0x80, 3, 0, typeGoAway, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 0)
	go func() {
		for i := range wire {
			server.Write(wire[i : i+1])
		}
	}()
	var data []byte
	fin := false
	for !fin {
		e, err := c.read()
		if err != nil || e.stream != 1 {
			t.Fatalf("%+v, %v", e, err)
		}
		data, fin = append(data, e.data...), e.fin
	}
	if string(data) != "hello" {
		t.Errorf("data %q", data)
	}
	if e, err := c.read(); err != nil || e.stream != 3 || !e.reset {
		t.Errorf("reset: %+v, %v", e, err)
	}
	if _, err := c.read(); err != errGoAway {
		t.Errorf("GOAWAY: %v", err)
	}
	answer := make([]byte, 12)
	if _, err := io.ReadFull(server, answer); err != nil || answer[3] != typePing || answer[11] != 2 {
		t.Errorf("PING was answered with %v, %v", answer, err)
	}
}

// TestHeaderBlocks inflates what appendStream makes with the standard library.
func TestHeaderBlocks(t *testing.T) {
	c := &connection{next: 1}
	var packed bytes.Buffer
	for _, name := range []string{"error", "stdout"} {
		frame, _ := c.appendStream(nil, "streamtype", name)
		if got := int(binary.BigEndian.Uint32(frame[4:])); got != len(frame)-headerLength {
			t.Fatalf("the frame says %d bytes and has %d", got, len(frame)-headerLength)
		}
		packed.Write(frame[headerLength+10:])
	}
	inflater, err := zlib.NewReader(&packed)
	if err != nil {
		t.Fatal(err)
	}
	want := "\x00\x00\x00\x01\x00\x00\x00\x0astreamtype\x00\x00\x00\x05error\x00\x00\x00\x01\x00\x00\x00\x0astreamtype\x00\x00\x00\x06stdout"
	got := make([]byte, len(want))
	if _, err := io.ReadFull(inflater, got); err != nil || string(got) != want {
		t.Errorf("got %q, %v", got, err)
	}
}

// TestAccount counts the CPU time of this very process.
func TestAccount(t *testing.T) {
	own, err := accountOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	before, err := own.used()
	if err != nil {
		t.Fatal(err)
	}
	for begin := time.Now(); time.Since(begin) < 20*time.Millisecond; {
		_ = median([]float64{3, 1, 2})
	}
	after, err := own.used()
	if err != nil || after <= before {
		t.Errorf("CPU time %v, then %v, %v", before, after, err)
	}
	if kib, err := own.memory(); err != nil || kib <= 0 {
		t.Errorf("memory %d KiB, %v", kib, err)
	}
}
