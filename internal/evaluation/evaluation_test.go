package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestPage makes the page of made-up results: a failure, a goal that is kept and
// one that is not, a row that was measured once.
func TestPage(t *testing.T) {
	report, err := readReport("testdata/results.json")
	if err != nil {
		t.Fatal(err)
	}
	sections := []Section{
		{Key: "start", Title: "Starting", Text: "What is measured here."},
		{Key: "stored", Title: "Storing", Text: "Two versions.", Ratios: true},
		{Key: "empty", Title: "Not measured"},
	}
	dir := t.TempDir()
	if err := writePage(report, sections, dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"evaluation.md", "evaluation/start.svg", "evaluation/stored.svg"} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		golden := filepath.Join("testdata", filepath.Base(name))
		if *update {
			if err := os.WriteFile(golden, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not as in %s (go test -update writes that):\n%s", name, golden, got)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "evaluation/empty.svg")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a plot of nothing: %v", err)
	}
}

func TestFigure(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   Figure
	}{
		{[]float64{3}, Figure{3, 3, 3}},
		{[]float64{5, 1, 2}, Figure{2, 1, 5}},
		{[]float64{4, 1}, Figure{2.5, 1, 4}},
		{[]float64{9, 1, 1, 1, 1}, Figure{1, 1, 9}},
	} {
		if got, ok := figure(c.values); !ok || got != c.want {
			t.Errorf("%v: got %+v, want %+v", c.values, got, c.want)
		}
	}
	if _, ok := figure(nil); ok {
		t.Error("there is a figure of nothing")
	}
}

// TestRatios: a slow round does not change what is said of two subjects.
func TestRatios(t *testing.T) {
	row := &Result{Subjects: []*Series{
		{Name: "a", Values: []float64{1, 10, 2}},
		{Name: "b", Values: []float64{2, 20, 4, 6}},
	}}
	if got := ratios(row.series("b"), row.series("a")); !slices.Equal(got, []float64{2, 2, 2}) {
		t.Errorf("got %v", got)
	}
	for _, c := range []struct {
		goal   Goal
		more   bool
		ok     bool
		got    float64
		absent bool
	}{
		{goal: Goal{2, "a"}, ok: true, got: 2},
		{goal: Goal{1.9, "a"}, got: 2},
		{goal: Goal{1.9, "a"}, more: true, ok: true, got: 2},
		{goal: Goal{Times: 4}, got: 5},
		{goal: Goal{Times: 6}, ok: true, got: 5},
		{goal: Goal{1, "nobody"}, absent: true},
	} {
		row.More = c.more
		got, ok, known := row.reached(row.series("b"), c.goal)
		if got != c.got || ok != c.ok || known == c.absent {
			t.Errorf("%+v: got %v, %v, %v", c.goal, got, ok, known)
		}
	}
}

// TestMeasure follows the order in which the subjects of a row have their turn.
func TestMeasure(t *testing.T) {
	var order string
	prepared, done := 0, 0
	subject := func(name string, err error) Subject {
		return Subject{Name: name, Measure: func(context.Context) (Measured, error) {
			order += name
			return Measured{Value: float64(len(order)), Also: map[string]float64{"turn": 1}}, err
		}}
	}
	row := Row{
		Section: "s", Name: "n",
		Prepare: func(context.Context) (func() error, error) {
			prepared++
			return func() error { done++; return nil }, nil
		},
		Subjects: []Subject{subject("a", nil), subject("b", nil), subject("c", errors.New("it broke"))},
	}
	r, err := row.measure(t.Context(), 3, t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	if want := "abcbaab"; order != want {
		t.Errorf("the order was %s, want %s", order, want)
	}
	if prepared != 1 || done != 1 {
		t.Errorf("prepared %d times, done %d times", prepared, done)
	}
	if a, c := r.series("a"), r.series("c"); !slices.Equal(a.Values, []float64{1, 5, 6}) || len(a.Also["turn"]) != 3 || len(c.Values) != 0 || c.Error != "it broke" {
		t.Errorf("a %+v, c %+v", a, c)
	}
	row.Once = true
	if r, err := row.measure(t.Context(), 3, t.Logf); err != nil || len(r.series("b").Values) != 1 {
		t.Errorf("once: %+v, %v", r, err)
	}
}

// TestRows looks at what the page will have: each row has a section, subjects
// with a name and a command of their own, and goals that something can reach.
func TestRows(t *testing.T) {
	sections, rows := chapters(&World{})
	keys := map[string]bool{}
	for _, s := range sections {
		if keys[s.Key] || s.Title == "" || s.Text == "" {
			t.Errorf("section %q: it is there twice, or says nothing", s.Key)
		}
		keys[s.Key] = true
	}
	names := map[string]bool{}
	for _, row := range rows {
		id := row.Section + "/" + row.Name
		if names[id] || !keys[row.Section] || len(row.Subjects) == 0 {
			t.Errorf("row %s: it is there twice, or has no section or subject", id)
		}
		names[id] = true
		subjects := map[string]bool{}
		for _, s := range row.Subjects {
			if s.Name == "" || s.Command == "" || s.Measure == nil || subjects[s.Name] {
				t.Errorf("row %s, subject %q: it is there twice, or lacks its command", id, s.Name)
			}
			subjects[s.Name] = true
		}
		if row.Against != "" && !subjects[row.Against] {
			t.Errorf("row %s is against %q, which it has not", id, row.Against)
		}
		for _, s := range row.Subjects {
			for _, g := range s.Goals {
				if g.Against != "" && !subjects[g.Against] {
					t.Errorf("row %s, subject %s: a goal is against %q, which the row has not", id, s.Name, g.Against)
				}
			}
		}
	}
}

// TestReport keeps what was measured before, and puts a row in its place.
func TestReport(t *testing.T) {
	file := filepath.Join(t.TempDir(), "evaluation/results.json")
	r, err := readReport(file)
	if err != nil {
		t.Fatal(err)
	}
	made := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	r.put(&Result{Section: "s", Name: "first", Made: made})
	r.put(&Result{Section: "s", Name: "second", Made: made})
	r.put(&Result{Section: "s", Name: "first", Unit: "ms", Made: made})
	if err := r.write(file); err != nil {
		t.Fatal(err)
	}
	again, err := readReport(file)
	if err != nil || len(again.Rows) != 2 || again.Rows[0].Unit != "ms" || !again.Rows[1].Made.Equal(made) {
		t.Errorf("%+v, %v", again, err)
	}
}

// TestProbe does each task at a directory and a file of this package.
func TestProbe(t *testing.T) {
	for name, do := range tasks {
		path := "testdata"
		if name == "sequential" || name == "random" {
			path = "testdata/start.svg"
		}
		if err := do(path); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := do(filepath.Join(t.TempDir(), "absent")); err == nil {
			t.Errorf("%s: no error where there is nothing", name)
		}
	}
}
