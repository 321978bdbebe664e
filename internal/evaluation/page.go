package main

import (
	"bytes"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
)

// Section is a part of the page.
type Section struct {
	Key   string
	Title string
	// Text says what is measured, and what the words of the table mean.
	Text string
	// Ratios says that the plot shows ratios, as the rows have different units.
	Ratios bool
}

// render writes the page, without its plots, which lie in the directory plots
// beside it.
func render(r *Report, sections []Section, plots string) []byte {
	var b bytes.Buffer
	fmt.Fprint(&b, head)
	m := r.Machine
	fmt.Fprintf(&b, "Measured on %d cores of %s with %s of memory, Linux %s.", m.Cores, m.CPU, gibibytes(m.Memory), m.Kernel)
	for _, name := range slices.Sorted(maps.Keys(m.Versions)) {
		fmt.Fprintf(&b, " %s %s.", name, m.Versions[name])
	}
	fmt.Fprint(&b, "\n")
	if busy := busiest(r); busy > 1.5 {
		fmt.Fprintf(&b, "\nThe machine did other work meanwhile: its load was up to %s. Ratios of such a run are worth more than its times.\n", digits(busy))
	}
	for _, s := range sections {
		rows := rowsOf(r, s.Key)
		if len(rows) == 0 {
			continue
		}
		fmt.Fprintf(&b, "\n## %s\n\n%s\n\n![%s](%s)\n\n", s.Title, strings.TrimSpace(s.Text), s.Title, filepath.Join(plots, s.Key+".svg"))
		fmt.Fprint(&b, "| | subject | median | spread | ratio | spread | also | goal | command |\n|---|---|---|---|---|---|---|---|---|\n")
		for _, row := range rows {
			renderRow(&b, row)
		}
	}
	return b.Bytes()
}

const head = `# Evaluation

Made by ` + "`make bench`" + ` from what it measured (` + "`evaluation/results.json`" + `): do not edit. Each row measures its subjects in turn, in rounds that each begin
with another of them. The median of all rounds is shown with the least and the most of them. A ratio is that of two measurements of the same round,
against the subject that has no ratio; with a goal, what was reached stands behind it.

`

func busiest(r *Report) float64 {
	most := 0.0
	for _, row := range r.Rows {
		most = max(most, row.Load)
	}
	return most
}

func rowsOf(r *Report, section string) []*Result {
	var rows []*Result
	for _, row := range r.Rows {
		if row.Section == section {
			rows = append(rows, row)
		}
	}
	return rows
}

func renderRow(b *bytes.Buffer, row *Result) {
	name := row.Name
	against := row.series(row.Against)
	for _, s := range row.Subjects {
		median, spread, ratio, ratioSpread := "–", "", "", ""
		if f, ok := figure(s.Values); ok {
			median = quantity(f.Median, row.Unit)
			spread = span(f)
		}
		if against != nil && s != against {
			if f, ok := figure(ratios(s, against)); ok {
				ratio, ratioSpread = digits(f.Median)+" ×", span(f)
			}
		}
		also := make([]string, 0, len(s.Also))
		for _, key := range slices.Sorted(maps.Keys(s.Also)) {
			f, _ := figure(s.Also[key])
			also = append(also, digits(f.Median)+" "+key)
		}
		if s.Error != "" {
			line, _, _ := strings.Cut(s.Error, "\n")
			also = append(also, "failed: "+line)
		}
		cells := []string{name, s.Name, median, spread, ratio, ratioSpread, strings.Join(also, ", "), goals(row, s), "`" + s.Command + "`"}
		for i, c := range cells {
			cells[i] = strings.ReplaceAll(c, "|", `\|`)
		}
		fmt.Fprintf(b, "| %s |\n", strings.Join(cells, " | "))
		name = ""
	}
}

// span is both ends of a figure that was measured more than once.
func span(f Figure) string {
	if f.Least == f.Most {
		return ""
	}
	return digits(f.Least) + "–" + digits(f.Most)
}

func goals(row *Result, s *Series) string {
	var all []string
	for _, g := range s.Goals {
		sign, unit := "≤", ""
		if row.More {
			sign = "≥"
		}
		text := digits(g.Times) + " × " + g.Against
		if g.Against == "" {
			unit = row.Unit
			text = quantity(g.Times, unit)
		}
		got, ok, known := row.reached(s, g)
		state := "not measured"
		switch {
		case known && ok:
			state = quantity(got, unit)
		case known:
			state = "**" + quantity(got, unit) + "**"
		}
		all = append(all, sign+" "+text+": "+state)
	}
	return strings.Join(all, "; ")
}

func gibibytes(n int64) string { return fmt.Sprintf("%.0f GiB", float64(n)/(1<<30)) }
