package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Report is all that was measured, as the file of results holds it.
type Report struct {
	Machine Machine   `json:"machine"`
	Rows    []*Result `json:"rows"`
}

// Machine is where it was measured.
type Machine struct {
	CPU      string            `json:"cpu"`
	Cores    int               `json:"cores"`
	Memory   int64             `json:"memory"` // bytes
	Kernel   string            `json:"kernel"`
	Versions map[string]string `json:"versions"` // of the programs that were compared
}

// Result is what was measured for a row.
type Result struct {
	Section  string    `json:"section"`
	Name     string    `json:"name"`
	Unit     string    `json:"unit"`
	More     bool      `json:"more,omitempty"` // more is better
	Against  string    `json:"against"`        // the subject that the others are divided by
	Made     time.Time `json:"made"`
	Load     float64   `json:"load"` // of the machine before it, in running processes
	Subjects []*Series `json:"subjects"`
}

// Series is what was measured of one subject, round by round: values at the same
// place were measured one after the other.
type Series struct {
	Name    string               `json:"name"`
	Command string               `json:"command"`
	Values  []float64            `json:"values"`
	Also    map[string][]float64 `json:"also,omitempty"` // further figures, by name and unit
	Goals   []Goal               `json:"goals,omitempty"`
	Error   string               `json:"error,omitempty"` // why there are no more values
}

// Goal is a bound for a series: at most so many times what another series has,
// or where more is better at least so many times. Without another, it bounds the
// value itself.
type Goal struct {
	Times   float64 `json:"times"`
	Against string  `json:"against,omitempty"`
}

func (r *Result) series(name string) *Series {
	for _, s := range r.Subjects {
		if s.Name == name {
			return s
		}
	}
	return nil
}

// Figure is the median of what was measured, with both ends of it.
type Figure struct{ Median, Least, Most float64 }

func figure(values []float64) (Figure, bool) {
	if len(values) == 0 {
		return Figure{}, false
	}
	v := slices.Sorted(slices.Values(values))
	return Figure{(v[(len(v)-1)/2] + v[len(v)/2]) / 2, v[0], v[len(v)-1]}, true
}

// ratios divides, round by round. A machine that is slower for a while is so for
// both, and the ratio of that round hardly differs.
func ratios(of, against *Series) []float64 {
	var out []float64
	for i := range min(len(of.Values), len(against.Values)) {
		if against.Values[i] != 0 {
			out = append(out, of.Values[i]/against.Values[i])
		}
	}
	return out
}

// reached tells how a goal stands: the figure that it bounds, and whether it
// keeps the bound.
func (r *Result) reached(s *Series, g Goal) (got float64, ok, known bool) {
	values := s.Values
	if g.Against != "" {
		other := r.series(g.Against)
		if other == nil {
			return 0, false, false
		}
		values = ratios(s, other)
	}
	f, known := figure(values)
	if r.More {
		return f.Median, f.Median >= g.Times, known
	}
	return f.Median, f.Median <= g.Times, known
}

// put adds a result, in the place of an earlier one of the same row.
func (r *Report) put(result *Result) {
	for i, old := range r.Rows {
		if old.Section == result.Section && old.Name == result.Name {
			r.Rows[i] = result
			return
		}
	}
	r.Rows = append(r.Rows, result)
}

func readReport(path string) (*Report, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return &Report{}, nil
	}
	if err != nil {
		return nil, err
	}
	r := &Report{}
	return r, json.Unmarshal(b, r)
}

func (r *Report) write(path string) error {
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}
