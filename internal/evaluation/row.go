package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// Row compares subjects at one task.
type Row struct {
	Section string // key of a section of the page
	Name    string
	Unit    string // of what Measure returns
	More    bool   // more is better
	Against string // the subject that the others are divided by
	// Once says that the figures are the same in each round, as bytes are.
	Once bool
	// Prepare makes what the row needs, and returns what takes it away again.
	Prepare  func(ctx context.Context) (done func() error, err error)
	Subjects []Subject
}

// Subject is one of those that a row compares.
type Subject struct {
	Name string
	// Command is what a person types to have it done.
	Command string
	Goals   []Goal
	// Measure does it once, from the same state as each time.
	Measure func(ctx context.Context) (Measured, error)
}

// Measured is what one measurement gave.
type Measured struct {
	Value float64
	Also  map[string]float64
}

// measure does a row: rounds of all subjects, each round beginning with another
// of them. A subject that fails is left out of further rounds.
func (row Row) measure(ctx context.Context, rounds int, say func(string, ...any)) (*Result, error) {
	result := &Result{Section: row.Section, Name: row.Name, Unit: row.Unit, More: row.More, Against: row.Against, Made: time.Now().UTC().Truncate(time.Second), Load: load()}
	for _, s := range row.Subjects {
		result.Subjects = append(result.Subjects, &Series{Name: s.Name, Command: s.Command, Goals: s.Goals})
	}
	if row.Prepare != nil {
		done, err := row.Prepare(ctx)
		if err != nil {
			return nil, err
		}
		defer func() {
			if err := done(); err != nil {
				say("%s: %v", row.Name, err)
			}
		}()
	}
	if row.Once {
		rounds = 1
	}
	for round := range rounds {
		for i := range row.Subjects {
			at := (round + i) % len(row.Subjects)
			subject, series := row.Subjects[at], result.Subjects[at]
			if series.Error != "" {
				continue
			}
			m, err := subject.Measure(ctx)
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if err != nil {
				series.Error = err.Error()
				say("%s / %s / %s: %v", row.Section, row.Name, subject.Name, err)
				continue
			}
			series.Values = append(series.Values, m.Value)
			for name, value := range m.Also {
				if series.Also == nil {
					series.Also = map[string][]float64{}
				}
				series.Also[name] = append(series.Also[name], value)
			}
			say("%s / %s / %s: %s", row.Section, row.Name, subject.Name, quantity(m.Value, row.Unit))
		}
	}
	return result, nil
}

// load is the machine's load over the last minute.
func load() float64 {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0
	}
	f, _ := strconv.ParseFloat(strings.Fields(string(b))[0], 64)
	return f
}

// timed returns how long f takes, in seconds.
func timed(f func() error) (Measured, error) {
	began := time.Now()
	err := f()
	return Measured{Value: time.Since(began).Seconds()}, err
}

// quantity writes a value with its unit, to three digits.
func quantity(v float64, unit string) string {
	s := digits(v)
	if unit != "" {
		s += " " + unit
	}
	return s
}

func digits(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v >= 100 || v <= -100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	case v >= 0.1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.2g", v)
}
