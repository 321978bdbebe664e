package transport

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
)

// TestHostileRegistry asks a registry that answers without an end: for an image
// and for its tags. Nothing is held of it but what a manifest or a page may have.
func TestHostileRegistry(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	endless := func(begin, again string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/vnd.oci.image.index.v1+json")
			again := strings.Repeat(again, 10_000)
			for _, err := io.WriteString(w, begin); err == nil; _, err = io.WriteString(w, again) {
			}
		}
	}
	// Each page leads to the next one.
	pages := func(tags string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", fmt.Sprintf(`<%s?n=%s1>; rel="next"`, r.URL.Path, strings.Repeat("1", len(r.URL.RawQuery)%7)))
			io.WriteString(w, `{"name":"x","tags":[`+tags+`]}`)
		}
	}
	for _, tt := range []struct {
		name           string
		manifest, tags http.HandlerFunc
		open, list     string // what the errors say
	}{
		{"fields", endless(`{"schemaVersion":2,"manifests":[`, `{},`), endless(`{"tags":[`, `"x",`), "the answer has more than", "the answer has more than"},
		{"white space", endless("", " "), endless("", " "), "the answer has more than", "the answer has more than"},
		{"one string", endless(`{"x":"`, "x"), endless(`{"tags":["`, "x"), "the answer has more than", "the answer has more than"},
		{"pages", endless("", "{"), pages(`"x"` + strings.Repeat(`,"x"`, 999)), "the answer has more than", "it lists more than"},
		{"empty pages", endless("", "["), pages(""), "the answer has more than", "it lists more than"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bounded.Case(t)
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				switch {
				case r.URL.Path == "/v2/":
				case strings.HasSuffix(r.URL.Path, "/tags/list"):
					tt.tags(w, r)
				default:
					tt.manifest(w, r)
				}
			}))
			defer s.Close()
			defer s.CloseClientConnections()
			at := strings.TrimPrefix(s.URL, "http://") + "/x"
			if _, err := Open(t.Context(), mustParse(t, at), Options{}); err == nil || !strings.Contains(err.Error(), tt.open) || strings.Contains(err.Error(), "\n") {
				t.Errorf("an image: got %.500v, want one line with %q", err, tt.open)
			}
			if _, err := ListPacks(t.Context(), "registry://"+at, Options{}); err == nil || !strings.Contains(err.Error(), tt.list) || strings.Contains(err.Error(), "\n") {
				t.Errorf("tags: got %.500v, want one line with %q", err, tt.list)
			}
		})
	}
}
