package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/container-bootfs/bootfs/internal/faultproxy"
)

// manyContainers are started at once on one node.
const manyContainers = 50

const manyText = `
%d containers of one image, python, started at once on one node whose engine has the image already: the source pulled before, against bootfs with its boot image
pulled before and an empty node cache that they share. The line is that of 1 Gbit/s. *MB* is what came over it: *of the image* says how often that is all
that one start alone takes.
`

func manySection() Section {
	return Section{Key: "many", Title: "Many containers on a node", Text: fmt.Sprintf(manyText, manyContainers)}
}

func manyRows(w *World) []Row {
	var i *image
	var alone float64 // megabytes that one container fetches
	line := speeds[1].speed
	measure := func(n int, ref func() string, flags func() []string) func(ctx context.Context) (Measured, error) {
		return func(ctx context.Context) (Measured, error) {
			if err := w.emptyNode(ctx); err != nil {
				return Measured{}, err
			}
			w.line.Set(faultproxy.Speed{})
			if _, err := w.docker.Output(ctx, "pull", "--quiet", ref()); err != nil {
				return Measured{}, err
			}
			f := flags()
			return w.overLine(ctx, line, func() error {
				errs := make([]error, n)
				var all sync.WaitGroup
				for k := range n {
					all.Go(func() { errs[k] = w.runUntilUseful(ctx, ref(), f) })
				}
				all.Wait()
				return errors.Join(errs...)
			})
		}
	}
	cache := func() []string {
		return append([]string{"--env", "BOOTFS_PREFETCH=start", "--volume", "cache:/.bootfs/rootfs.castr"}, lazyFlags...)
	}
	source, converted := func() string { return i.source }, func() string { return i.converted }
	shared := measure(manyContainers, converted, cache)
	command := fmt.Sprintf("for i in $(seq %d); do docker run --network host %%s & done", manyContainers)
	return []Row{{
		Section: "many", Name: "python", Unit: "s", Against: "source, pulled",
		Prepare: func(ctx context.Context) (func() error, error) {
			var err error
			if i, err = w.application(ctx, applications[0]); err != nil {
				return nil, err
			}
			m, err := measure(1, converted, cache)(ctx)
			alone = m.Also["MB"]
			return func() error { return nil }, err
		},
		Subjects: []Subject{
			{Name: "source, pulled", Command: fmt.Sprintf(command, "SOURCE"), Measure: measure(manyContainers, source, func() []string { return nil })},
			{
				Name: "bootfs", Command: fmt.Sprintf(command, strings.Join(slices.Concat([]string{"--volume", "cache:/.bootfs/rootfs.castr"}, lazyFlags), " ")+" CONVERTED"), Goals: []Goal{{1.3, "source, pulled"}},
				Measure: func(ctx context.Context) (Measured, error) {
					m, err := shared(ctx)
					if err == nil && alone > 0 {
						m.Also["times what one fetches"] = m.Also["MB"] / alone
					}
					return m, err
				},
			},
		},
	}}
}
