// Package wire is the client's end of a streaming connection for benchmarks and soaks. It is cheap, and the caller sees
// every frame.
package wire

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
)

// It implements just enough of SPDY/3.1 to be cheap. It reads 256 KiB at a time, looks at frame headers in place, never
// inflates a header block, and sends its own blocks as stored deflate blocks. It has no goroutine: the caller reads the
// events.

const (
	// HeaderLength is the length of a frame's header, in bytes.
	HeaderLength = 8
	// ReadBuffer is how much is read at once, in bytes.
	ReadBuffer = 256 << 10

	flagFin = 1

	typeSynStream = 1
	typeSynReply  = 2
	typeRstStream = 3
	typePing      = 6
	typeGoAway    = 7
)

// Conn is the client's end. One goroutine reads. Others may write.
type Conn struct {
	net.Conn

	buffer     []byte // buffer[start:end] is read and not parsed yet
	start, end int
	stream     uint32 // of the data frame whose payload is read next
	remaining  int
	fin        bool

	writing  sync.Mutex
	zlibOpen bool
	next     uint32
}

// Event is something that the server has sent. Its data is valid until the next call of Next.
type Event struct {
	Stream uint32
	Data   []byte
	Fin    bool // the last of the stream
	Reset  bool
}

// ErrGoAway is returned by Next when the server ends the connection.
var ErrGoAway = errors.New("the server said GOAWAY")

// Upgrade dials a streaming URL and upgrades the connection.
func Upgrade(address, protocol string) (*Conn, error) {
	target, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	raw, err := net.Dial("tcp", target.Host)
	if err != nil {
		return nil, err
	}
	request := "POST " + target.RequestURI() + " HTTP/1.1\r\nHost: " + target.Host +
		"\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: " + protocol +
		"\r\nContent-Length: 0\r\n\r\n"
	if _, err := raw.Write([]byte(request)); err != nil {
		return nil, errors.Join(err, raw.Close())
	}
	reader := bufio.NewReaderSize(raw, 4<<10)
	response, err := http.ReadResponse(reader, nil) //nolint:bodyclose // an upgraded one has no body
	if err != nil {
		return nil, errors.Join(err, raw.Close())
	}
	if response.StatusCode != http.StatusSwitchingProtocols {
		text, _ := io.ReadAll(io.LimitReader(response.Body, 4<<10)) //nolint:errcheck // the status says enough
		response.Body.Close()                                       //nolint:errcheck // only read
		return nil, errors.Join(fmt.Errorf("upgrade: %s: %s", response.Status, text), raw.Close())
	}
	c := &Conn{Conn: raw, next: 1}
	if n := reader.Buffered(); n > 0 {
		early, _ := reader.Peek(n) //nolint:errcheck // n bytes are there
		c.buffer = make([]byte, ReadBuffer)
		c.end = copy(c.buffer, early)
	}
	return c, nil
}

// Release frees the buffer of a connection that will be idle. Nothing may be unread.
func (c *Conn) Release() {
	if c.start == c.end {
		c.buffer, c.start, c.end = nil, 0, 0
	}
}

// fill reads more and keeps what is there.
func (c *Conn) fill() error {
	if c.buffer == nil {
		c.buffer = make([]byte, ReadBuffer)
	}
	if c.start > 0 {
		c.end = copy(c.buffer, c.buffer[c.start:c.end])
		c.start = 0
	}
	n, err := c.Read(c.buffer[c.end:])
	c.end += n
	if n > 0 {
		return nil
	}
	return err
}

// Next returns the next event: payload as it is received, the end of a stream, or a reset.
func (c *Conn) Next() (Event, error) {
	for {
		if c.remaining > 0 {
			if c.start == c.end {
				if err := c.fill(); err != nil {
					return Event{}, err
				}
			}
			n := min(c.end-c.start, c.remaining)
			e := Event{Stream: c.stream, Data: c.buffer[c.start : c.start+n]}
			c.start += n
			c.remaining -= n
			e.Fin = c.fin && c.remaining == 0
			return e, nil
		}
		for c.end-c.start < HeaderLength {
			if err := c.fill(); err != nil {
				return Event{}, err
			}
		}
		frame := c.buffer[c.start:c.end]
		flags, length := frame[4], int(frame[5])<<16|int(frame[6])<<8|int(frame[7])
		if frame[0]&0x80 == 0 {
			c.stream, c.remaining, c.fin = binary.BigEndian.Uint32(frame), length, flags&flagFin != 0
			c.start += HeaderLength
			if length == 0 {
				return Event{Stream: c.stream, Fin: c.fin}, nil
			}
			continue
		}
		if HeaderLength+length > ReadBuffer {
			return Event{}, fmt.Errorf("control frame of %d bytes", length)
		}
		for c.end-c.start < HeaderLength+length {
			if err := c.fill(); err != nil {
				return Event{}, err
			}
		}
		frame = c.buffer[c.start : c.start+HeaderLength+length]
		c.start += len(frame)
		payload := frame[HeaderLength:]
		switch binary.BigEndian.Uint16(frame[2:]) {
		case typeSynReply:
			if flags&flagFin != 0 {
				return Event{Stream: binary.BigEndian.Uint32(payload), Fin: true}, nil
			}
		case typeRstStream:
			return Event{Stream: binary.BigEndian.Uint32(payload), Reset: true}, nil
		case typePing:
			if binary.BigEndian.Uint32(payload)%2 == 0 { // a PING of the server; answers to ours are odd
				if err := c.WriteFrames(append([]byte(nil), frame...)); err != nil {
					return Event{}, err
				}
			}
		case typeGoAway:
			return Event{}, ErrGoAway
		}
	}
}

// WriteFrames writes whole frames, made by AppendStream, AppendData and AppendDataHeader.
func (c *Conn) WriteFrames(frames []byte) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	_, err := c.Write(frames)
	return err
}

// AppendStream appends a SYN_STREAM with the given headers, alternately names and values, and returns the id of the new
// stream. Only one caller may open streams.
func (c *Conn) AppendStream(frames []byte, headers ...string) ([]byte, uint32) {
	id := c.next
	c.next += 2
	block := binary.BigEndian.AppendUint32(nil, uint32(len(headers)/2))
	for _, text := range headers {
		block = binary.BigEndian.AppendUint32(block, uint32(len(text)))
		block = append(block, text...)
	}
	var packed []byte
	if !c.zlibOpen { // zlib's header (RFC 1950) begins the one zlib stream of all header blocks
		c.zlibOpen = true
		packed = append(packed, 0x78, 0x01)
	}
	// A stored block (RFC 1951, 3.2.4).
	packed = append(packed, 0)
	packed = binary.LittleEndian.AppendUint16(packed, uint16(len(block)))
	packed = binary.LittleEndian.AppendUint16(packed, ^uint16(len(block)))
	packed = append(packed, block...)
	packed = append(packed, 0, 0, 0, 0xff, 0xff) // an empty one, which makes inflaters return all that they have

	frames = binary.BigEndian.AppendUint32(frames, 1<<31|3<<16|typeSynStream)
	frames = binary.BigEndian.AppendUint32(frames, uint32(10+len(packed)))
	frames = binary.BigEndian.AppendUint32(frames, id)
	frames = append(frames, 0, 0, 0, 0, 0, 0)
	return append(frames, packed...), id
}

// AppendData appends a data frame.
func AppendData(frames []byte, stream uint32, fin bool, payload []byte) []byte {
	frames = AppendDataHeader(frames, stream, fin, len(payload))
	return append(frames, payload...)
}

// AppendDataHeader appends the header of a data frame with a payload of the given length.
func AppendDataHeader(frames []byte, stream uint32, fin bool, length int) []byte {
	frames = binary.BigEndian.AppendUint32(frames, stream)
	word := uint32(length)
	if fin {
		word |= flagFin << 24
	}
	return binary.BigEndian.AppendUint32(frames, word)
}
