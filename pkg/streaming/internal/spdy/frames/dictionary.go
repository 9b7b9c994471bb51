package frames

import "encoding/binary"

// dictionaryID is the Adler-32 of the Dictionary. The zlib header of every header stream contains it.
const dictionaryID = 0xe3c6a7c2

// dictionaryWords are in the Dictionary, each after its length, as in a header block.
var dictionaryWords = [...]string{
	"options", "head", "post", "put", "delete", "trace", "accept", "accept-charset",
	"accept-encoding", "accept-language", "accept-ranges", "age", "allow", "authorization",
	"cache-control", "connection", "content-base", "content-encoding", "content-language",
	"content-length", "content-location", "content-md5", "content-range", "content-type", "date",
	"etag", "expect", "expires", "from", "host", "if-match", "if-modified-since", "if-none-match",
	"if-range", "if-unmodified-since", "last-modified", "location", "max-forwards", "pragma",
	"proxy-authenticate", "proxy-authorization", "range", "referer", "retry-after", "server", "te",
	"trailer", "transfer-encoding", "upgrade", "user-agent", "vary", "via", "warning",
	"www-authenticate", "method", "get", "status", "200 OK", "version", "HTTP/1.1", "url", "public",
	"set-cookie", "keep-alive", "origin",
}

// dictionaryTail follows the words.
const dictionaryTail = "100101201202205206300302303304305306307402405406407408409410411412413414" +
	"415416417502504505203 Non-Authoritative Information204 No Content301 Moved Permanently" +
	"400 Bad Request401 Unauthorized403 Forbidden404 Not Found500 Internal Server Error" +
	"501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec " +
	"00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg," +
	"image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,public" +
	"privatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."

// Dictionary is the preset zlib dictionary of header blocks (SPDY/3.1 draft, 2.6.10.1).
var Dictionary = makeDictionary()

func makeDictionary() []byte {
	var d []byte
	for _, word := range dictionaryWords {
		d = binary.BigEndian.AppendUint32(d, uint32(len(word)))
		d = append(d, word...)
	}
	return append(d, dictionaryTail...)
}
