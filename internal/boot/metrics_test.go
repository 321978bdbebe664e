package boot

import (
	"bytes"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/internal/bootimage"
)

func TestParseMetrics(t *testing.T) {
	for value, want := range map[string]metricsAddress{
		"": {}, ":9100": {"tcp", ":9100"}, "127.0.0.1:9100": {"tcp", "127.0.0.1:9100"}, "[::1]:9100": {"tcp", "[::1]:9100"},
		"unix:/metrics/bootfs.sock": {"unix", "/metrics/bootfs.sock"},
	} {
		if got, err := parseMetrics(value); err != nil || got != want {
			t.Errorf("%q: got %+v, %v, want %+v", value, got, err, want)
		}
	}
	for _, value := range []string{"9100", ":0", ":http", ":99999", "unix:", "unix:relative", "unix:/a/../b", "unix:/", "::1"} {
		if _, err := parseMetrics(value); err == nil || !strings.Contains(err.Error(), "BOOTFS_METRICS") {
			t.Errorf("%q: got %v", value, err)
		}
	}
}

// TestScrape: a scraper gets metrics, and who sends no request or too much of one
// nothing.
func TestScrape(t *testing.T) {
	out := newConsole(io.Discard, 0)
	r := newReporter(&bootimage.Config{IndexDigest: "sha256:0f"}, out)
	ask := func(request string) string {
		t.Helper()
		client, server := net.Pipe()
		go func() { scrape(server, r); server.Close() }()
		go func() { _, _ = io.WriteString(client, request) }()
		_ = client.SetDeadline(time.Now().Add(time.Minute))
		answer, err := io.ReadAll(client)
		if err != nil {
			t.Fatal(err)
		}
		return string(answer)
	}
	if answer := ask("GET /metrics?x=y HTTP/1.1\r\nHost: h\r\n\r\n"); !strings.HasPrefix(answer, "HTTP/1.1 200 OK\r\n") || !strings.Contains(answer, "\nbootfs_reads_total 0\n") {
		t.Errorf("got %q", answer)
	}
	for request, want := range map[string]string{
		"GET / HTTP/1.1\r\n\r\n": "HTTP/1.1 404", "POST /metrics HTTP/1.1\r\n\r\n": "HTTP/1.1 405",
		strings.Repeat("x", 2*maxRequest): "", "GET /metrics HTTP/1.1\r\n" + strings.Repeat("a: b\r\n", maxRequest): "",
	} {
		if answer := ask(request); !strings.HasPrefix(answer, want) || want == "" && answer != "" {
			t.Errorf("%.40q: got %q, want %q", request, answer, want)
		}
	}
	var b bytes.Buffer
	(&status{Stores: []storeStatus{{Name: "a\"b\\c\nd"}}}).writeMetrics(&b)
	if want := `bootfs_store_up{store="a\"b\\c\nd",place="0"} 0`; !strings.Contains(b.String(), want) {
		t.Errorf("want %s in\n%s", want, b.String())
	}
}
