package e2e

import (
	"strings"
	"testing"
)

// TestPlainDockerRun gives docker run nothing but the image and the network.
func TestPlainDockerRun(t *testing.T) {
	source := docker(t, "run", "--rm", "--network", "host", w.source)
	r := docker(t, "run", "--rm", "--network", "host", w.image)
	if r.code != 0 || r.stdout != source.stdout {
		t.Errorf("exit %d, stdout %q, stderr %q; want the output of the source image, %q", r.code, r.stdout, r.stderr, source.stdout)
	}
	if !strings.HasPrefix(r.stderr, "bootfs: the root is filled in place: add --device /dev/fuse --cap-add SYS_ADMIN to docker run") {
		t.Errorf("stderr %q does not say what would make it lazy", r.stderr)
	}
	if r := runFilled(t, w.image); r.code != 0 || r.stdout != source.stdout || r.stderr != "" {
		t.Errorf("a fill that was asked for: exit %d, stdout %q, stderr %q; want the output of the source image and nothing else", r.code, r.stdout, r.stderr)
	}
}
