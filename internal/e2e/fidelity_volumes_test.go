package e2e

import (
	"os"
	"path/filepath"
	"testing"
)

// volumeRows are what is mounted into a container.
var volumeRows = []row{
	{what: "`-v FILE:/bin/testapp`, a program in the place of one of the image's", do: func(t *testing.T, s *subject) string {
		program := hostFile(t, "program", "#!/bin/sh\necho \"this is $0 with $*\"\n", 0o755)
		args := []string{"-v", program + ":/bin/testapp:ro"}
		return s.run(t, append(args, s.image, "sh", "-c", "testapp a b; ls -l /bin/testapp; cut -d' ' -f5,6 /proc/self/mountinfo | grep bin")...).String() +
			s.run(t, append(args, "--entrypoint", "/bin/testapp", s.image, "c")...).String() +
			s.run(t, append(args, "--entrypoint", "cat", s.image, "/etc/passwd")...).String()
	}},
}

// hostFile makes a file on the host for a container to mount.
func hostFile(t *testing.T, name, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return path
}
