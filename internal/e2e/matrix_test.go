package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// The matrix says in which mode a container starts under which restriction: for
// each an empty text, or what boot says before it exits with 125.
var matrix = []struct {
	what  string // as the page prints it
	flags []string
	told  [len(matrixColumns)]string
}{
	{"no restriction", nil, [3]string{}},
	{"`--read-only`", []string{"--read-only"}, [3]string{
		"",
		"the root cannot be filled in place, as it is read-only: leave --read-only out of docker run",
		"the root cannot be filled in place, as it is read-only: leave --read-only out of docker run, or add --device /dev/fuse --cap-add SYS_ADMIN to mount it",
	}},
	{"`--security-opt no-new-privileges`, root", []string{"--security-opt", "no-new-privileges"}, [3]string{}},
	{"`--security-opt no-new-privileges`, another user", []string{"--security-opt", "no-new-privileges", "--user", "nobody"}, [3]string{noRoot, noRoot, noRoot}},
	{"`--cap-drop ALL`", []string{"--cap-drop", "ALL"}, [3]string{
		"the root cannot be mounted: add --cap-add SYS_CHROOT --cap-add CHOWN --cap-add DAC_OVERRIDE --cap-add SETPCAP to docker run",
		"the root cannot be filled in place: add --cap-add CHOWN --cap-add DAC_OVERRIDE --cap-add FOWNER --cap-add FSETID --cap-add SETFCAP to docker run",
		"the root cannot be filled in place: add --cap-add CHOWN --cap-add DAC_OVERRIDE --cap-add FOWNER --cap-add FSETID --cap-add SETFCAP to docker run, " +
			"or add --device /dev/fuse --cap-add SYS_ADMIN --cap-add SYS_CHROOT --cap-add CHOWN --cap-add DAC_OVERRIDE --cap-add SETPCAP to mount it",
	}},
}

const noRoot = "boot is uid 65534 and needs uid 0 to make the root filesystem; no-new-privileges takes the effect of its setuid bit: " +
	"leave --security-opt no-new-privileges out of docker run, or add --user root"

var matrixColumns = [3]struct {
	what  string
	flags []string
}{
	{"`--device /dev/fuse --cap-add SYS_ADMIN`: FUSE", []string{"--device", "/dev/fuse", "--cap-add", "SYS_ADMIN", "--env", "BOOTFS_MODE=fuse"}},
	{"`-e BOOTFS_MODE=fill`: fill", []string{"--env", "BOOTFS_MODE=fill"}},
	{"neither: fill", nil},
}

// TestMatrix starts a container in each cell of the matrix: it works as the
// source image does, or says what is in the way and exits with 125.
func TestMatrix(t *testing.T) {
	source, converted := fidelityImage(t, "plain")
	for _, r := range matrix {
		for i, c := range matrixColumns {
			t.Run(r.what+" "+c.what, func(t *testing.T) {
				t.Parallel()
				run := append([]string{"run", "--rm", "--network", "host"}, r.flags...)
				command := []string{"sh", "-c", "id; pwd; grep -E '^(Cap...|NoNewPrivs|Seccomp):' /proc/self/status; touch /tmp/x; echo $?"}
				got := docker(t, slices.Concat(run, c.flags, []string{converted}, command)...)
				if told := r.told[i]; told != "" {
					if got.code != 125 || got.stdout != "" || got.stderr != "bootfs: "+told+"\n" {
						t.Errorf("exit %d, stdout %q, stderr %q; want exit 125 and %q", got.code, got.stdout, got.stderr, told)
					}
					return
				}
				want := docker(t, slices.Concat(run, []string{source}, command)...)
				if got.code != want.code || got.stdout != want.stdout {
					t.Errorf("exit %d, stdout %q, stderr %q; want as the source image exit %d, stdout %q", got.code, got.stdout, got.stderr, want.code, want.stdout)
				}
			})
		}
	}
}

// matrixSection is the matrix as a part of the page on fidelity.
func matrixSection() string {
	var b strings.Builder
	b.WriteString("## What a container may lack\n\nEach cell works as the source image does, or the container exits with 125 and says why.\n\n| |")
	for _, c := range matrixColumns {
		fmt.Fprintf(&b, " %s |", c.what)
	}
	fmt.Fprintf(&b, "\n|---|%s\n", strings.Repeat("---|", len(matrixColumns)))
	for _, r := range matrix {
		fmt.Fprintf(&b, "| %s |", r.what)
		for _, told := range r.told {
			cell := "works"
			if told != "" {
				cell = "125: " + told
			}
			fmt.Fprintf(&b, " %s |", inTable(cell))
		}
		b.WriteByte('\n')
	}
	return b.String()
}
