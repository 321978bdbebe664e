package testenv

import (
	"io"
	"net/http"
	"strings"
	"testing"
)

// TestS3 looks whether the server asks who is there, and starts again.
func TestS3(t *testing.T) {
	s, err := StartS3(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.MakeBucket("bucket"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		for _, at := range []struct{ host, path string }{{s.Address, "/bucket/key"}, {"bucket." + s.Domain, "/key"}} {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+s.Address+at.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Host = at.host
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || resp.StatusCode != http.StatusForbidden || !strings.Contains(string(body), "<Code>AccessDenied</Code>") {
				t.Errorf("%s%s: got %s, %v, want AccessDenied\n%s", at.host, at.path, resp.Status, err, body)
			}
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := s.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
