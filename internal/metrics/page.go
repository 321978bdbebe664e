package metrics

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
)

// Page is metrics in the text format of Prometheus. The zero value is empty.
type Page struct {
	text bytes.Buffer
}

// Counter adds a metric that only grows, of one value.
func (p *Page) Counter(name, help string, value float64) {
	p.Family(name, "counter", help)
	p.Sample(name, value)
}

// Gauge adds a metric that goes up and down, of one value.
func (p *Page) Gauge(name, help string, value float64) {
	p.Family(name, "gauge", help)
	p.Sample(name, value)
}

// Family begins a metric whose values Sample adds. kind is "counter" or "gauge".
func (p *Page) Family(name, kind, help string) {
	fmt.Fprintf(&p.text, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// inLabel escapes the value of a label.
var inLabel = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// Sample adds a value of the metric that Family has begun. labels are names and
// values in turn; values may be anything.
func (p *Page) Sample(name string, value float64, labels ...string) {
	p.text.WriteString(name)
	for i := 0; i < len(labels); i += 2 {
		start := ","
		if i == 0 {
			start = "{"
		}
		p.text.WriteString(start + labels[i] + `="` + inLabel.Replace(strings.ToValidUTF8(labels[i+1], "?")) + `"`)
	}
	if len(labels) > 0 {
		p.text.WriteByte('}')
	}
	p.text.WriteString(" " + strconv.FormatFloat(value, 'f', -1, 64) + "\n")
}

// Truth is 1 for true.
func Truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// String returns the page.
func (p *Page) String() string { return p.text.String() }
