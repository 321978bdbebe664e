package e2e

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/failure.md and docs/fidelity.md anew instead of comparing with them")

const failurePage = "../../docs/failure.md"

// TestFaultTable makes each fault of docs/failure.md happen and compares the
// outcomes with that page, which it writes with -update.
func TestFaultTable(t *testing.T) {
	env := newFaultEnv(t)
	var network, said, cache, processes string
	t.Run("tables", func(t *testing.T) {
		for name, table := range map[string]func(*testing.T){
			"network":   func(t *testing.T) { network, said = networkTables(t, env) },
			"processes": func(t *testing.T) { processes = processTable(t) },
			"cache":     func(t *testing.T) { cache = cacheTable(t, env) },
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel() // they mostly wait
				table(t)
			})
		}
	})
	page := failureHead + network + cache + processes + said
	switch {
	case realFaults: // a second is a part of what the page says
		return
	case network == "" || cache == "" || processes == "":
		return // -run has left out a part, or one has failed
	}
	if *update {
		if err := os.WriteFile(failurePage, []byte(page), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	have, err := os.ReadFile(failurePage)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != page {
		t.Errorf("docs/failure.md is not what happens: read what differs, then write it anew with\n\tgo test ./internal/e2e -run TestFaultTable -update\n%s", firstDifference(string(have), page))
	}
}

// firstDifference shows the first line in which two texts differ.
func firstDifference(have, want string) string {
	h, w := strings.Split(have, "\n"), strings.Split(want, "\n")
	for i := range max(len(h), len(w)) {
		var a, b string
		if i < len(h) {
			a = h[i]
		}
		if i < len(w) {
			b = w[i]
		}
		if a != b {
			return fmt.Sprintf("line %d:\n\thave %s\n\twant %s", i+1, a, b)
		}
	}
	return ""
}

const failureHead = `# When something fails

What a converted image does when what is between it and its chunks fails, or itself. ` + "`internal/e2e`" + ` makes each fault happen, looks
at the outcome and writes this page (` + "`go test ./internal/e2e -run TestFaultTable -update`" + `); without ` + "`-update`" + ` it compares, so
the page says what the program does.

**Expected** is what must hold in every cell of the row; the cells are what was **seen**. The test fails where a cell is not as expected, or another than
stands here. But whether data takes a second attempt or comes from the second store is chance on a busy machine, and all cells of data are the same to it there.
Whatever the cell, it also checks that the bytes were right or that there were none, that the answer came before the deadline, and that what failed
works once the fault has healed.

- **start**: the fault is there when the container starts: start set and program are fetched for the first time.
- **read**: the container runs, has read before, and reads something that nobody has read yet.
- **prefetch**: the container runs and fetches the rest ahead.

How long a read waits, what a second request and another store do for it, and how to wait for a store instead of an error stand in
[running.md](running.md#when-a-store-fails).

## Stores

A read has 60 s; a store that brings less than 16 KiB in 10 s is given up and asked anew. The test takes a tenth of these times and of those of the faults, and a
quarter with SSH. The same open image reads again once the fault has healed.

- **data**: what was asked for, in time; **EIO**: an error, at the latest when the time is up.
- **second store**: as *read*, with another store behind the one that fails: there always is data. Ten more chunks do not wait for the first one again.
- **web server**, **SFTP**: the same from single chunks there.
`

const failureHTTP = `
### Registry and web server

| fault | expected | start | read | prefetch | second store | web server: read | start | prefetch |
|---|---|---|---|---|---|---|---|---|
`

const failureSSH = `
### SSH

A connection is given up when it has been silent for 20 s.

| fault | expected | start | read | prefetch | second store | SFTP: read | start | prefetch |
|---|---|---|---|---|---|---|---|---|
`

const failureCache = `
## Node cache

The registry is good and the cache is not: no read fails. Behind the bytes stands what the cache has of the chunks that were read, once the fault is over.
*start* is a container, *read* and *prefetch* its parts that read. Where prefetch finds a file that may be the chunk, it does not read it; the next read
does, and heals it.

| fault | expected | start | read | prefetch |
|---|---|---|---|---|
`

const failureProcesses = `
## Containers

The whole, with the engine: a container waits for a chunk when it happens, in its start, in a read, or in a prefetch.

| fault | expected | start | read | prefetch |
|---|---|---|---|---|
`

const failureSaid = `
## What the log says

A read that fails is EIO for the program and a line in boot's log. This is the line's end, without the names of chunks and hosts and with N
for numbers of bytes. An attempt has the less time the later it is: where a store does not answer in it, "nothing arrived within N s; before that: " stands
before the reason.

| fault | from | what the log says |
|---|---|---|
`
