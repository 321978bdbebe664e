package s3store

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"

	"github.com/container-bootfs/bootfs/internal/httpio"
)

const (
	maxFault = 64 << 10 // bytes of an error's description
	maxDepth = 16       // elements within one another
	maxText  = 4 << 10  // bytes of one element's text
	maxWords = 200      // bytes of it in a message
)

var (
	errDeep = errors.New("elements nested too deep")
	errLong = errors.New("an element is too long")
)

// readXML calls text with each element's path, "A/B/C" without namespaces, and
// its text, when the element ends. The size of what r gives is for the caller
// to bound.
func readXML(r io.Reader, text func(path, text string)) error {
	d := xml.NewDecoder(r)
	d.Strict = true
	var path []string
	var current []byte
	for {
		t, err := d.RawToken()
		if err == io.EOF {
			if len(path) > 0 {
				return io.ErrUnexpectedEOF
			}
			return nil
		}
		if err != nil {
			return err
		}
		switch t := t.(type) {
		case xml.StartElement:
			if len(path) == maxDepth {
				return errDeep
			}
			path, current = append(path, t.Name.Local), current[:0]
		case xml.CharData:
			if len(current)+len(t) > maxText {
				return errLong
			}
			current = append(current, t...)
		case xml.EndElement:
			if len(path) == 0 || path[len(path)-1] != t.Name.Local {
				return errors.New("elements do not match")
			}
			text(strings.Join(path, "/"), string(current))
			path, current = path[:len(path)-1], current[:0]
		}
	}
}

// fault is what a server says of a request that it refused. Each field is ""
// where it says nothing that can be shown.
type fault struct {
	code     string // as S3 names it
	message  string // one line
	region   string // where the bucket is
	endpoint string // the same as a host
}

var codeName = pattern(`^[A-Za-z0-9._-]{1,64}$`)

// readFault reads the description of an error, as far as it is one.
func readFault(r io.Reader) fault {
	var f fault
	readXML(io.LimitReader(r, maxFault), func(path, text string) {
		text = strings.TrimSpace(text)
		// STS wraps what S3 does not.
		switch strings.TrimPrefix(path, "ErrorResponse/") {
		case "Error/Code":
			if codeName().MatchString(text) {
				f.code = text
			}
		case "Error/Message":
			f.message = oneLine(text)
		case "Error/Region":
			if regionName().MatchString(text) {
				f.region = text
			}
		case "Error/Endpoint":
			f.endpoint = oneLine(text)
		}
	})
	return f
}

// oneLine makes a server's text fit for a message.
func oneLine(s string) string { return strings.TrimRight(httpio.OneLine(s, maxWords), ".") }
