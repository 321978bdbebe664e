package httpio

import (
	"bytes"
	"fmt"
	"io"
	"mime"
	"net/http"
	"slices"
)

const (
	firstGrowth = 1 << 20 // bytes that a response may claim before it brings them
	maxDrain    = 4 << 10 // bytes that are read to keep a connection
)

// SetBody gives req a body, of which each part that the connection takes is a
// sign of life for w.
func SetBody(req *http.Request, body []byte, w *Watch) {
	req.ContentLength = int64(len(body))
	req.GetBody = func() (io.ReadCloser, error) { return upload{bytes.NewReader(body), w}, nil }
	req.Body, _ = req.GetBody()
}

type upload struct {
	*bytes.Reader
	watch *Watch
}

func (u upload) Read(p []byte) (int, error) {
	u.watch.Restart()
	return u.Reader.Read(p)
}

// WriteTo is not the bytes.Reader's, which would write all at once, unwatched.
func (u upload) WriteTo(w io.Writer) (int64, error) { return io.Copy(w, struct{ io.Reader }{u}) }

func (u upload) Close() error { return nil }

// CheckType refuses by its headers a response that is not what a store has: a
// web page, or something compressed with other encodings than those. want says
// what it should be, files what the server must leave as they are.
func CheckType(resp *http.Response, want, files string, encodings ...string) error {
	e := &Error{Status: resp.StatusCode, Temporary: true}
	if enc := resp.Header.Get("Content-Encoding"); enc != "" && enc != "identity" && !slices.Contains(encodings, enc) {
		e.Err = fmt.Errorf("got content encoded as %.100q, want it as it is: the server, or a proxy before it, must not compress %s", enc, files)
		return e
	}
	if t, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); t == "text/html" {
		e.Err = fmt.Errorf("got a web page from %s, want %s: a login page of the network, or the address is not that of such a server", HostOf(resp.Request.URL.String()), want)
		return e
	}
	return nil
}

// ReadBody appends the body of a response to dst: a chunk of at most limit
// bytes.
func (w *Watch) ReadBody(resp *http.Response, dst []byte, limit int) ([]byte, error) {
	tooLong := func() error {
		return &Error{Status: resp.StatusCode, Err: fmt.Errorf("got more than %d bytes: that is no chunk", limit)}
	}
	if resp.ContentLength > int64(limit) {
		return nil, tooLong()
	}
	had := len(dst)
	most := had + limit
	dst = slices.Grow(dst, int(min(max(resp.ContentLength, 0), firstGrowth))+1)
	for {
		n, err := w.Read(resp.Body, dst[len(dst):min(cap(dst), most+1)])
		dst = dst[:len(dst)+n]
		switch {
		case len(dst) > most:
			return nil, tooLong()
		case err == io.EOF:
			return dst, nil
		case err != nil:
			return nil, fmt.Errorf("after %d bytes: %w", len(dst)-had, err)
		}
		if len(dst) == cap(dst) {
			dst = slices.Grow(dst, 1)
		}
	}
}

// Leave gives up the rest of a response, and keeps the connection where that
// costs little.
func (w *Watch) Leave(resp *http.Response) {
	if resp.ContentLength >= 0 && resp.ContentLength <= maxDrain {
		w.Restart()
		io.Copy(io.Discard, io.LimitReader(resp.Body, maxDrain))
		w.Stop()
	}
	resp.Body.Close()
}
