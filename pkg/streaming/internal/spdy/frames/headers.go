package frames

import (
	"bytes"
	"compress/flate"
	"compress/zlib"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
)

// A header block (draft, 2.6.10) is a list of name-value pairs, compressed with zlib. All blocks of one direction of a
// connection form one zlib stream. Each block ends with a sync flush. So every block of the peer must be inflated, wanted
// or not, as long as a later one must be read. And ours must be sent in the order in which they were made.

// zlibHeader begins a zlib stream with the SPDY Dictionary (RFC 1950, 2.2): deflate with a 32 KiB window, FDICT, the check
// bits, and the Dictionary's Adler-32.
var zlibHeader = []byte{0x78, 0xbb, dictionaryID >> 24, dictionaryID >> 16 & 0xff, dictionaryID >> 8 & 0xff, dictionaryID & 0xff}

// syncFlush is an empty stored block (RFC 1951, 3.2.4). Without it an inflater holds back the bytes before it.
var syncFlush = []byte{0x00, 0x00, 0x00, 0xff, 0xff}

// maxStored is the largest size of a stored block of deflate.
const maxStored = 1<<16 - 1

// AppendHeaderBlock appends a header block. It begins the zlib stream if the block is the first of its direction. It does
// not compress: the pairs are in stored blocks, which every inflater accepts. A compressor would cost some 800 KiB for each
// connection, to save a hundred bytes once.
func AppendHeaderBlock(b []byte, first bool, header http.Header) []byte {
	if first {
		b = append(b, zlibHeader...)
	}
	for plain := AppendHeaderPairs(nil, header); len(plain) > 0; {
		n := min(len(plain), maxStored)
		b = append(b, 0)
		b = binary.LittleEndian.AppendUint16(b, uint16(n))
		b = binary.LittleEndian.AppendUint16(b, ^uint16(n))
		b = append(b, plain[:n]...)
		plain = plain[n:]
	}
	return append(b, syncFlush...)
}

// AppendHeaderPairs appends the uncompressed form: names in lower case and sorted, the values of a name separated by NUL.
func AppendHeaderPairs(b []byte, header http.Header) []byte {
	names := make([]string, 0, len(header))
	for name := range header {
		names = append(names, name)
	}
	slices.Sort(names)

	b = binary.BigEndian.AppendUint32(b, uint32(len(names)))
	for _, name := range names {
		value := strings.Join(header[name], "\x00")
		b = binary.BigEndian.AppendUint32(b, uint32(len(name)))
		b = append(b, strings.ToLower(name)...)
		b = binary.BigEndian.AppendUint32(b, uint32(len(value)))
		b = append(b, value...)
	}
	return b
}

// EmptyHeaderBlock is what AppendHeaderBlock appends for no headers. A SYN_REPLY carries nothing else.
var EmptyHeaderBlock = []byte{
	0x00, 0x04, 0x00, 0xfb, 0xff, // stored block of four bytes
	0x00, 0x00, 0x00, 0x00, // no pairs
	0x00, 0x00, 0x00, 0xff, 0xff,
}

// HeaderLimits bounds what a header block may cost.
type HeaderLimits struct {
	Count int // name-value pairs
	Field int // bytes of one name or one value
	Total int // bytes of a block, inflated
}

// HeaderFault is a fault in a well-formed block: the draft forbids its content. It ends the stream but not the connection,
// because the zlib stream is intact.
type HeaderFault string

func (f HeaderFault) Error() string { return "header block: " + string(f) }

// maxLeftover bounds the bytes of a block that an inflater may leave for later: a sync flush, and the last bits of the
// block before it.
const maxLeftover = 16

// HistorySize is how far back an inflater looks (RFC 1951, 2).
const HistorySize = 32 << 10

// HeaderReader inflates the header blocks of one direction. It takes about 45 KiB, and 40 KiB more if there were many
// headers. See TakeHeaderReader and Release.
type HeaderReader struct {
	inflater io.ReadCloser // nil before the first use
	input    blockReader
	started  bool // the inflater has seen the first block of this connection
	broken   bool

	past    []byte // the Dictionary and what was inflated, at least the last HistorySize bytes
	flushed bool   // the last block ended with a sync flush
	resumed bool   // inflater is of another kind, which the next connection cannot use
}

// headerReaders keeps readers for later connections.
var headerReaders = sync.Pool{New: func() any { return new(HeaderReader) }}

// TakeHeaderReader returns a reader for a new connection.
func TakeHeaderReader() *HeaderReader { return headerReaders.Get().(*HeaderReader) }

// Release returns the reader to the pool. The caller must not use it any more.
func (r *HeaderReader) Release() {
	if r.resumed {
		return
	}
	r.input = blockReader{}
	r.started, r.broken, r.flushed, r.past = false, false, false, r.past[:0]
	headerReaders.Put(r)
}

// History returns what a reader in another process needs to continue after the last block. The reader cannot be used
// afterwards.
func (r *HeaderReader) History() ([]byte, error) {
	if !r.started {
		return nil, nil
	}
	if r.broken {
		return nil, errInflaterBroken
	}
	r.broken = true
	// What remains is the end of the block and the empty block of the flush. The next block begins on a byte boundary after
	// it.
	n, err := r.inflater.Read(make([]byte, 1))
	if !r.flushed || n > 0 || err != io.ErrUnexpectedEOF {
		return nil, errors.New("header blocks that do not end with a sync flush")
	}
	return slices.Clone(r.past[max(0, len(r.past)-HistorySize):]), nil // past serves the next connection
}

// ResumeHeaderReader returns a reader that continues after that history.
func ResumeHeaderReader(history []byte) *HeaderReader {
	r := &HeaderReader{started: true, flushed: true, resumed: true, past: slices.Clone(history)}
	r.inflater = flate.NewReaderDict(&r.input, history)
	return r
}

// remember adds to the past what was inflated.
func (r *HeaderReader) remember(p []byte) {
	const slack = 8 << 10
	if len(r.past)+len(p) > HistorySize+slack {
		n := copy(r.past, r.past[max(0, len(r.past)-HistorySize):])
		r.past = r.past[:n]
	}
	r.past = append(r.past, p...)
}

var errInflaterBroken = errors.New("header block after a broken one")

// Read inflates one block. A HeaderFault ends the stream. Any other error ends the connection, because the zlib stream is
// lost.
func (r *HeaderReader) Read(block []byte, limits HeaderLimits) (http.Header, error) {
	if r.broken {
		return nil, errInflaterBroken
	}
	header, err := r.readBlock(block, limits)
	if err != nil && !IsHeaderFault(err) {
		r.broken = true
	}
	return header, err
}

func (r *HeaderReader) readBlock(block []byte, limits HeaderLimits) (http.Header, error) {
	r.input.add(block)
	r.flushed = bytes.HasSuffix(block, syncFlush[1:])
	if !r.started {
		if err := r.open(); err != nil {
			return nil, fmt.Errorf("header block: %w", err)
		}
		r.started = true
	}

	left := limits.Total
	number := func() (int, error) {
		var b [4]byte
		if left < len(b) {
			return 0, fmt.Errorf("header block inflates to more than %d bytes", limits.Total)
		}
		left -= len(b)
		if _, err := io.ReadFull(r.inflater, b[:]); err != nil {
			return 0, fmt.Errorf("header block: %w", noEOF(err))
		}
		r.remember(b[:])
		return int(binary.BigEndian.Uint32(b[:])), nil
	}
	text := func() (string, error) {
		n, err := number()
		if err != nil {
			return "", err
		}
		if n > limits.Field {
			return "", fmt.Errorf("header name or value of %d bytes, limit %d", n, limits.Field)
		}
		if n > left {
			return "", fmt.Errorf("header block inflates to more than %d bytes", limits.Total)
		}
		left -= n
		b := make([]byte, n)
		if _, err := io.ReadFull(r.inflater, b); err != nil {
			return "", fmt.Errorf("header block: %w", noEOF(err))
		}
		r.remember(b)
		return string(b), nil
	}

	count, err := number()
	if err != nil {
		return nil, err
	}
	if count > limits.Count {
		return nil, fmt.Errorf("header block with %d headers, limit %d", count, limits.Count)
	}
	var fault error
	header := make(http.Header, count)
	for range count {
		name, err := text()
		if err != nil {
			return nil, err
		}
		value, err := text()
		if err != nil {
			return nil, err
		}
		key := http.CanonicalHeaderKey(name)
		switch {
		case name == "":
			fault = HeaderFault("empty name")
		case name != strings.ToLower(name):
			fault = HeaderFault("name not in lower case")
		case header[key] != nil:
			fault = HeaderFault("name twice")
		}
		header[key] = strings.Split(value, "\x00")
	}
	if r.input.left() > maxLeftover {
		return nil, fmt.Errorf("header block: %d bytes behind the last header", r.input.left())
	}
	r.input.keep()
	if fault != nil {
		return nil, fault
	}
	return header, nil
}

func (r *HeaderReader) open() error {
	r.past = append(r.past[:0], Dictionary...)
	if r.inflater != nil {
		return r.inflater.(zlib.Resetter).Reset(&r.input, Dictionary)
	}
	inflater, err := zlib.NewReaderDict(&r.input, Dictionary)
	if err != nil {
		return err
	}
	r.inflater = inflater
	return nil
}

// IsHeaderFault reports whether an error ends only the stream.
func IsHeaderFault(err error) bool {
	var fault HeaderFault
	return errors.As(err, &fault)
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// blockReader feeds an inflater with the rest of the last block and then with the next one. It has ReadByte so that the
// inflater does not add a buffer of its own, which would read ahead.
type blockReader struct {
	rest  [maxLeftover]byte
	restN int    // bytes in rest
	restR int    // how many of them are read
	block []byte // borrowed during one readBlock
}

func (b *blockReader) add(block []byte) { b.block = block }

func (b *blockReader) left() int { return b.restN - b.restR + len(b.block) }

// keep copies the rest, at most maxLeftover bytes, out of the borrowed block.
func (b *blockReader) keep() {
	n := copy(b.rest[:], b.rest[b.restR:b.restN])
	n += copy(b.rest[n:], b.block)
	b.restR, b.restN, b.block = 0, n, nil
}

func (b *blockReader) Read(p []byte) (int, error) {
	if b.restR < b.restN {
		n := copy(p, b.rest[b.restR:b.restN])
		b.restR += n
		return n, nil
	}
	if len(b.block) == 0 {
		return 0, io.EOF
	}
	n := copy(p, b.block)
	b.block = b.block[n:]
	return n, nil
}

func (b *blockReader) ReadByte() (byte, error) {
	if b.restR < b.restN {
		b.restR++
		return b.rest[b.restR-1], nil
	}
	if len(b.block) == 0 {
		return 0, io.EOF
	}
	c := b.block[0]
	b.block = b.block[1:]
	return c, nil
}
