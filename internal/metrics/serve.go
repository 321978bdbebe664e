package metrics

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/container-bootfs/bootfs/internal/answer"
)

const (
	maxScrapers   = 16              // served at a time
	scrapeTimeout = 5 * time.Second // for request and answer
	maxRequest    = 8 << 10         // bytes
)

// Serve answers GET /metrics at l with what fill puts on a page, until l is
// closed.
func Serve(l net.Listener, fill func(*Page)) {
	answer.Each(l, maxScrapers, scrapeTimeout, func(conn net.Conn) { scrape(conn, fill) })
}

// scrape answers one request.
func scrape(conn io.ReadWriter, fill func(*Page)) {
	in := bufio.NewReader(io.LimitReader(conn, maxRequest))
	request, err := in.ReadString('\n')
	for line := request; err == nil && strings.TrimRight(line, "\r\n") != ""; {
		line, err = in.ReadString('\n')
	}
	if err != nil {
		return
	}
	method, rest, _ := strings.Cut(request, " ")
	path, _, _ := strings.Cut(rest, " ")
	path, _, _ = strings.Cut(path, "?")
	code, body := "200 OK", ""
	switch {
	case method != "GET" && method != "HEAD":
		code = "405 Method Not Allowed\r\nAllow: GET, HEAD"
	case path != "/metrics":
		code, body = "404 Not Found", "see /metrics\n"
	default:
		var p Page
		fill(&p)
		body = p.String()
	}
	head := fmt.Sprintf("HTTP/1.1 %s\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: %d\r\nConnection: close\r\n\r\n", code, len(body))
	if method == "HEAD" {
		body = ""
	}
	_, _ = io.WriteString(conn, head+body) // a scraper that has left
}
