package s3store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/internal/httpio"
)

const (
	maxPage = 4 << 20 // bytes of a page of a list: maxKeys of 1 KiB, all of it escaped, are less
	maxKeys = 1000    // of a page, as S3 has it
	// maxIdlePages is how many pages in a row may bring no chunk: a bucket may
	// hold other things too, but no list goes on for ever.
	maxIdlePages = 10_000
)

var errLoop = errors.New("the server lists the same again")

// List yields every chunk below the address. It asks for 1000 keys at a time.
func (s *Store) List(ctx context.Context) iter.Seq2[chunkstore.Entry, error] {
	return func(yield func(chunkstore.Entry, error) bool) {
		token, last := "", "" // of the page, and the last key that was seen
		for idle := 0; ; idle++ {
			p, err := s.page(ctx, token, last)
			if err == nil && idle == maxIdlePages {
				err = s.listError(fmt.Errorf("no chunk on %d pages", idle))
			}
			if err != nil {
				yield(chunkstore.Entry{}, err)
				return
			}
			for _, e := range p.entries {
				idle = 0
				if !yield(e, nil) {
					return
				}
			}
			if p.next == "" {
				return
			}
			token, last = p.next, p.last
		}
	}
}

func (s *Store) listError(err error) error {
	return &chunkstore.Error{Store: s.String(), Did: "list the chunks", Err: err}
}

// page is a part of the list of a bucket.
type page struct {
	entries []chunkstore.Entry
	last    string // its last key
	next    string // token of the next page, "" after the last
}

// page gets the page that token stands for; its keys come behind last.
func (s *Store) page(ctx context.Context, token, last string) (*page, error) {
	q, err := s.begin(ctx, "list the chunks", s.stall)
	if err != nil {
		return nil, err
	}
	defer q.end()
	query := fmt.Sprintf("encoding-type=url&list-type=2&max-keys=%d&prefix=", maxKeys) + escape(s.address.prefix, false)
	if token != "" {
		query = "continuation-token=" + escape(token, false) + "&" + query
	}
	resp, err := q.send(ask{method: http.MethodGet, query: query})
	if err != nil {
		return nil, q.fail(err)
	}
	defer q.watch.Leave(resp)
	p, err := s.readPage(io.LimitReader(watched{q.watch, resp.Body}, maxPage), last)
	if err == nil && p.next == token && token != "" {
		err = errLoop
	}
	if err != nil {
		return nil, q.fail(fmt.Errorf("the server's list: %w", err))
	}
	return p, nil
}

// watched reads the body of a response.
type watched struct {
	watch *httpio.Watch
	body  io.Reader
}

func (w watched) Read(p []byte) (int, error) { return w.watch.Read(w.body, p) }

func (s *Store) readPage(r io.Reader, last string) (*page, error) {
	const root = "ListBucketResult/"
	p := &page{last: last}
	var (
		answered, truncated, encoded bool
		key, token                   string
		e                            chunkstore.Entry
		wrong                        bool
	)
	// That keys are encoded may be said behind them.
	type object struct {
		key   string
		entry chunkstore.Entry
	}
	var objects []object
	err := readXML(r, func(path, text string) {
		text = strings.TrimSpace(text)
		switch name, _ := strings.CutPrefix(path, root); name {
		case "ListBucketResult":
			answered = true
		case "EncodingType":
			encoded = text == "url"
		case "IsTruncated":
			truncated = text == "true"
		case "NextContinuationToken":
			token = text
		case "Contents/Key":
			key = text
		case "Contents/Size":
			var err error
			e.Size, err = strconv.ParseInt(text, 10, 64)
			wrong = wrong || err != nil
		case "Contents/LastModified":
			var err error
			e.Modified, err = time.Parse(time.RFC3339, text)
			wrong = wrong || err != nil
		case "Contents":
			if len(objects) < maxKeys {
				objects = append(objects, object{key, e})
			}
			key, e = "", chunkstore.Entry{}
		}
	})
	switch {
	case err != nil:
		return nil, err
	case wrong:
		return nil, errors.New("a size or a time that is none")
	case !answered:
		return nil, errors.New("that is none")
	case truncated && token == "":
		return nil, errors.New("it goes on, and nothing says where")
	case truncated:
		p.next = token
	}
	for _, o := range objects {
		if encoded {
			if o.key, err = url.QueryUnescape(o.key); err != nil {
				return nil, err
			}
		}
		id, ok := s.address.chunkOf(o.key)
		if !ok || o.entry.Size < 0 {
			continue
		}
		// Keys come in their order; a list that goes back would never end.
		if o.key <= p.last {
			return nil, errLoop
		}
		p.last = o.key
		o.entry.ID = id
		p.entries = append(p.entries, o.entry)
	}
	return p, nil
}
