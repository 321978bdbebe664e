// Command evaluation measures bootfs against what else a user could pick, on one
// machine, and writes the page docs/evaluation.md. make bench runs it.
//
// What is measured stands in rows: a task, the subjects that do it in turn, and
// for each of them the command that does it. Each row that was measured takes the
// place of an earlier one in the file of results, so that a part can be measured
// anew (-rows); the page and its plots are made of that file alone (-rounds 0).
//
// It is a module of its own: what draws the plots and the chunkers that are
// compared are no dependencies of bootfs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"

	"github.com/container-bootfs/bootfs/internal/testenv"
)

func main() {
	testenv.EnterContainer()
	if len(os.Args) == 4 && os.Args[1] == "probe" {
		exit(probe(os.Args[2], os.Args[3]))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	exit(run(ctx))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "evaluation:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// chapters are the sections of the page, each with the rows that it has.
func chapters(w *World) (sections []Section, rows []Row) {
	sections = append(startSections(), bootSection(), nativeSection(), conversionSection(), storedSection(), manySection())
	for _, of := range []func(*World) []Row{startRows, bootRows, nativeRows, conversionRows, storedRows, manyRows} {
		rows = append(rows, of(w)...)
	}
	return sections, rows
}

func run(ctx context.Context) (err error) {
	root := flag.String("root", "../..", "`DIR` of the module bootfs")
	out := flag.String("out", "../../docs", "`DIR` of evaluation.md, and of evaluation/ with the results and the plots")
	rounds := flag.Int("rounds", 7, "how often each subject of a row is measured; 0: only make the page of what there is")
	only := flag.String("rows", "", "`REGEXP` of the rows that are measured, as SECTION/NAME (default all)")
	list := flag.Bool("list", false, "only list the rows")
	flag.Parse()
	if flag.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flag.Arg(0))
	}
	wanted, err := regexp.Compile(*only)
	if err != nil {
		return err
	}
	if *list {
		_, rows := chapters(&World{})
		for _, row := range rows {
			fmt.Printf("%s/%s\n", row.Section, row.Name)
		}
		return nil
	}
	if *root, err = filepath.Abs(*root); err != nil {
		return err
	}
	file := filepath.Join(*out, "evaluation/results.json")
	report, err := readReport(file)
	if err != nil {
		return err
	}
	if *rounds > 0 {
		err = measureAll(ctx, *root, report, file, wanted, *rounds)
	}
	sections, _ := chapters(&World{})
	return errors.Join(err, writePage(report, sections, *out))
}

// measureAll measures the rows that are wanted. Each goes to the file once it is
// done, so what was measured stays if a later row takes too long.
func measureAll(ctx context.Context, root string, report *Report, file string, wanted *regexp.Regexp, rounds int) (err error) {
	if err := ownMounts(); err != nil {
		return err
	}
	w, err := newWorld(ctx, root)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if report.Machine, err = machine(ctx); err != nil {
		return err
	}
	say := func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
	_, rows := chapters(w)
	failed := 0
	for _, row := range rows {
		if !wanted.MatchString(row.Section + "/" + row.Name) {
			continue
		}
		result, err := row.measure(ctx, rounds, say)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			say("%s / %s: %v", row.Section, row.Name, err)
			failed++
			continue
		}
		for _, s := range result.Subjects {
			if s.Error != "" {
				failed++
			}
		}
		report.put(result)
		if err := report.write(file); err != nil {
			return err
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d rows or subjects failed; what they said stands above", failed)
	}
	return nil
}

// writePage writes the page, and the plot of each section.
func writePage(report *Report, sections []Section, out string) error {
	if err := os.MkdirAll(filepath.Join(out, "evaluation"), 0o755); err != nil {
		return err
	}
	for _, s := range sections {
		rows := rowsOf(report, s.Key)
		if len(rows) == 0 {
			continue
		}
		svg, err := drawPlot(s, rows)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(out, "evaluation", s.Key+".svg"), svg, 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(out, "evaluation.md"), render(report, sections, "evaluation"), 0o644)
}
