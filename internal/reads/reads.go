// Package reads is about which parts of an image's files a program reads until
// it is ready: [Recorder] notes them where the root image is served, and a file
// keeps them as text, by which a conversion puts their chunks beside one another.
//
// The text names files and not chunks, so that it holds for the next version of
// an image as well:
//
//	bootfs start set 1
//	0+262144 /usr/local/bin/python3.13
//	all /etc/ld.so.cache
//
// Ranges stand in the order in which they were first read. Two files behind one
// another are a file again: that of both workloads.
package reads

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Header is the first line of a file, without its end.
const Header = "bootfs start set 1"

// Limits of a file that is read.
const (
	MaxFile   = 16 << 20 // bytes
	MaxRanges = 200_000
	maxPath   = 4095
	maxOffset = 1 << 50 // bytes; no file of an image is larger
)

// Range is a part of a file.
type Range struct {
	Path   string // absolute, without "." and ".."
	Offset int64  // bytes
	Size   int64  // bytes; 0 is up to the end of the file
}

// Parse reads a file.
func Parse(r io.Reader) ([]Range, error) {
	b, err := io.ReadAll(io.LimitReader(r, MaxFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > MaxFile {
		return nil, fmt.Errorf("it has more than %d bytes", MaxFile)
	}
	var out []Range
	number := 0
	for line := range bytes.Lines(b) {
		number++
		text := strings.TrimSuffix(strings.TrimSuffix(string(line), "\n"), "\r")
		switch {
		case text == Header:
			continue // of the first file, or of another one behind it
		case number == 1:
			return nil, fmt.Errorf("it begins with %.40q, want %q", text, Header)
		case text == "" || text[0] == '#':
			continue
		case len(out) == MaxRanges:
			return nil, fmt.Errorf("it has more than %d ranges", MaxRanges)
		}
		g, err := parseRange(text)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", number, err)
		}
		out = append(out, g)
	}
	if number == 0 {
		return nil, fmt.Errorf("it is empty, want %q", Header)
	}
	return out, nil
}

func parseRange(line string) (Range, error) {
	place, name, ok := strings.Cut(line, " ")
	if !ok {
		return Range{}, fmt.Errorf("got %.80q, want OFFSET+SIZE PATH or all PATH", line)
	}
	var g Range
	var err error
	if g.Path, err = parsePath(name); err != nil {
		return Range{}, err
	}
	if place == "all" {
		return g, nil
	}
	offset, size, ok := strings.Cut(place, "+")
	if g.Offset, err = parseBytes(offset); err == nil {
		g.Size, err = parseBytes(size)
	}
	if !ok || err != nil || g.Size == 0 {
		return Range{}, fmt.Errorf("got range %.80q, want OFFSET+SIZE in bytes, or all", place)
	}
	return g, nil
}

func parseBytes(s string) (int64, error) {
	n, err := strconv.ParseUint(s, 10, 63)
	if err == nil && n > maxOffset {
		err = strconv.ErrRange
	}
	return int64(n), err
}

func parsePath(s string) (string, error) {
	if strings.HasPrefix(s, `"`) {
		var err error
		if s, err = strconv.Unquote(s); err != nil {
			return "", errors.New("a path whose quotes do not fit")
		}
	}
	switch {
	case len(s) > maxPath:
		return "", fmt.Errorf("a path of %d bytes, want at most %d", len(s), maxPath)
	case !path.IsAbs(s) || path.Clean(s) != s || s == "/" || strings.IndexByte(s, 0) >= 0:
		return "", fmt.Errorf("path %.80q: want that of a file, from / on", s)
	}
	return s, nil
}

// Write writes ranges as a file that Parse reads. Of those that cannot be in one
// it is not told apart: who makes them keeps to the limits.
func Write(w io.Writer, ranges []Range) error {
	b := bufio.NewWriter(w)
	fmt.Fprintln(b, Header)
	for _, g := range ranges {
		if g.Offset == 0 && g.Size == 0 {
			b.WriteString("all ")
		} else {
			fmt.Fprintf(b, "%d+%d ", g.Offset, g.Size)
		}
		if plain(g.Path) {
			b.WriteString(g.Path)
		} else {
			b.WriteString(strconv.Quote(g.Path))
		}
		b.WriteByte('\n')
	}
	return b.Flush()
}

// plain reports whether a path can stand on a line as it is.
func plain(p string) bool {
	return utf8.ValidString(p) && strings.IndexFunc(p, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
}
