package assembly

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
)

// TestLinkStartsProgram starts a static program through a link, as an engine
// starts boot.
func TestLinkStartsProgram(t *testing.T) {
	dir := t.TempDir()
	program, link := filepath.Join(dir, "program"), filepath.Join(dir, "link")
	build := exec.Command("go", "build", "-o", program, "../testenv/testapp")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.WriteFile(link, must(linkTo(must(os.ReadFile(program))(t), program))(t), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(link)
	cmd.Args = []string{"another name", "env", "a b", ""}
	var got struct{ Args []string }
	if err := json.Unmarshal(must(cmd.Output())(t), &got); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got.Args, cmd.Args) {
		t.Errorf("got arguments %q, want %q", got.Args, cmd.Args)
	}
}

func TestLinkIsLikeItsProgram(t *testing.T) {
	for _, c := range []struct {
		name    string
		class   elf.Class
		data    elf.Data
		machine elf.Machine
		flags   uint32
	}{
		{"amd64", elf.ELFCLASS64, elf.ELFDATA2LSB, elf.EM_X86_64, 0},
		{"ppc64le", elf.ELFCLASS64, elf.ELFDATA2LSB, elf.EM_PPC64, 2},
		{"s390x", elf.ELFCLASS64, elf.ELFDATA2MSB, elf.EM_S390, 0},
		{"arm", elf.ELFCLASS32, elf.ELFDATA2LSB, elf.EM_ARM, 0x5000000},
	} {
		t.Run(c.name, func(t *testing.T) {
			var order binary.ByteOrder = binary.LittleEndian
			if c.data == elf.ELFDATA2MSB {
				order = binary.BigEndian
			}
			ident := [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(c.class), byte(c.data), 1}
			var head bytes.Buffer
			var h any = elf.Header64{Ident: ident, Machine: uint16(c.machine), Flags: c.flags}
			if c.class == elf.ELFCLASS32 {
				h = elf.Header32{Ident: ident, Machine: uint16(c.machine), Flags: c.flags}
			}
			if err := binary.Write(&head, order, h); err != nil {
				t.Fatal(err)
			}
			link := must(linkTo(append(head.Bytes(), make([]byte, headSize)...), "/the/program"))(t)
			f := must(elf.NewFile(bytes.NewReader(link)))(t)
			if f.Class != c.class || f.Data != c.data || f.Machine != c.machine || f.Type != elf.ET_DYN || len(f.Progs) != 3 {
				t.Errorf("got %+v", f.FileHeader)
			}
			if got := string(must(io.ReadAll(f.Progs[0].Open()))(t)); f.Progs[0].Type != elf.PT_INTERP || got != "/the/program\x00" {
				t.Errorf("interpreter %q", got)
			}
			flags := order.Uint32(link[48:])
			if c.class == elf.ELFCLASS32 {
				flags = order.Uint32(link[36:])
			}
			if flags != c.flags {
				t.Errorf("flags %#x, want %#x", flags, c.flags)
			}
		})
	}
	for _, head := range [][]byte{nil, []byte("#!/bin/sh"), append([]byte(elf.ELFMAG), make([]byte, headSize)...)} {
		if _, err := linkTo(head, "/the/program"); err == nil {
			t.Errorf("%q: no error", head)
		}
	}
}

// A file can have so many names and no more.
func TestLimitLinks(t *testing.T) {
	files := map[string]file{"/etc": {mode: modeDir | 0o755}}
	for i := range maxHardLinks + 5 {
		files[fmt.Sprintf("/bin/%06d", i)] = file{mode: modeRegular | 0o4755, linkTo: "/link"}
	}
	limitLinks(files, []byte("a link"))
	links, others := 0, 0
	for _, f := range files {
		switch {
		case f.linkTo != "":
			links++
		case f.size == int64(len("a link")) && f.mode == modeRegular|0o4755:
			others++
		}
	}
	if links != maxHardLinks || others != 5 {
		t.Errorf("%d links and %d files of their own", links, others)
	}
}
