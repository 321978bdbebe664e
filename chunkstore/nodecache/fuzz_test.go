package nodecache

import (
	"encoding/json"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// FuzzMarker reads any marker: what is accepted is JSON as a whole and names our
// format, and everything else is refused in one line that says which it is.
func FuzzMarker(f *testing.F) {
	for _, s := range []string{
		`{"version":1}` + "\n", `{"version":1,"later":{"a":[1]}}`, `{"VERSION":1}`, `{"version":2}`, `{"version":0}`, `{"version":-1}`,
		`{"version":1e0}`, `{"version":99999999999999999999}`, `{"version":"1"}`, `{"version":null}`, `{}`, `null`, `[]`, ``, "\x00", "{\"version\":1}\n\x00",
		`{"version":1}` + strings.Repeat(" ", maxMarker) + "x", `{"version":1,"x":"` + strings.Repeat("y", maxMarker), strings.Repeat("[", maxMarker),
	} {
		f.Add([]byte(s))
	}
	dir := f.TempDir()
	c := open(f, dir, Options{})
	f.Fuzz(func(t *testing.T, raw []byte) {
		if err := os.WriteFile(filepath.Join(dir, markerName), raw, 0o644); err != nil {
			t.Fatal(err)
		}
		marked, err := c.checkMarker()
		if err != nil {
			var v *VersionError
			if marked || !errors.As(err, &v) || v.Version == Version || strings.Contains(err.Error(), "\n") || len(err.Error()) > 1000 {
				t.Errorf("got %t, %v", marked, err)
			}
			return
		}
		var m struct{ Version float64 }
		if err := json.Unmarshal(raw, &m); !marked || err != nil || m.Version != Version || len(raw) > maxMarker {
			t.Errorf("accepted %d bytes, %t, as format %v (%v)", len(raw), marked, m.Version, err)
		}
	})
}

// FuzzSize reads any size and reserve: what is accepted can be counted with,
// says the same again in bytes, and what is not is named.
func FuzzSize(f *testing.F) {
	for _, s := range []string{
		"0", "1", "20GiB", "1.5TB", "512 MiB", "4kB", "8KB", "7B", "0.1B", ".5GiB", "1.", ".", "", "GiB", "-1", "+1", "1e9", "0x10", "1_000", "NaN", "Inf", "٣GiB",
		"9223372036854775807", "9223372036854774784", "8388607TiB", "8388608TiB", "5%", "0%", "99.99%", "100%", "1e1%", "%", "5 %", "-5%", "10%%", strings.Repeat("9", 400),
	} {
		f.Add(s, int64(1<<40))
	}
	f.Add("0.0000000000001%", int64(math.MaxInt64))
	f.Add("99.9999999999999999%", int64(math.MaxInt64))
	f.Fuzz(func(t *testing.T, s string, disk int64) {
		refused := func(what string, err error) {
			if text := err.Error(); !strings.HasPrefix(text, what+" "+strconv.Quote(s)+": want ") || strings.Contains(text, "\n") {
				t.Errorf("got %v", err)
			}
		}
		n, err := ParseSize(s)
		if err != nil {
			refused("size", err)
		} else if again, err := ParseSize(strconv.FormatInt(n, 10)); n < 0 || n == Unlimited || err != nil || again != n {
			t.Errorf("%q is %d bytes, and those are %d, %v", s, n, again, err)
		}
		r, err := ParseReserve(s)
		switch {
		case err != nil:
			refused("reserve", err)
		case strings.HasSuffix(s, "%"):
			if of := r.of(disk); r.Bytes != 0 || r.Percent < 0 || r.Percent >= 100 || disk >= 0 && (of < 0 || of > disk) {
				t.Errorf("%q is %+v, %d of %d bytes", s, r, of, disk)
			}
		case r.Percent != 0 || r.Bytes != n || r.of(disk) != n:
			t.Errorf("%q is %+v, as a size %d", s, r, n)
		}
	})
}
