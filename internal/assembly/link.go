package assembly

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
)

const (
	// headSize is what linkTo needs of a program: the larger of the ELF headers.
	headSize = 64
	// maxHardLinks bounds the names of one file. File systems allow 32,000 and
	// more; ext4 65,000.
	maxHardLinks = 30_000
	// pageSize is at least that of every kernel.
	pageSize = 64 << 10
)

// linkTo returns an executable that starts the program at path, whose first
// bytes are head, in its own place: a file of about 200 bytes without code that
// names the program as its dynamic loader. The program sees the arguments as
// they were given and, in AT_EXECFN, the path that was started.
//
// A symlink would do that too, but mounts go where symlinks lead: what a user
// mounts over /usr/bin/tool would lie on the program. And a script would lose
// argument 0.
func linkTo(head []byte, path string) ([]byte, error) {
	if len(head) < headSize || !bytes.HasPrefix(head, []byte(elf.ELFMAG)) {
		return nil, fmt.Errorf("the boot binary is no ELF executable")
	}
	var order binary.ByteOrder = binary.LittleEndian
	if elf.Data(head[elf.EI_DATA]) == elf.ELFDATA2MSB {
		order = binary.BigEndian
	}
	var ident [elf.EI_NIDENT]byte
	copy(ident[:], head)
	machine := order.Uint16(head[18:])
	name := append([]byte(path), 0)
	var out bytes.Buffer
	write := func(parts ...any) {
		for _, p := range parts {
			_ = binary.Write(&out, order, p) // a buffer takes everything
		}
	}
	switch elf.Class(head[elf.EI_CLASS]) {
	case elf.ELFCLASS64:
		const headers, each, n = 64, 56, 3
		at, size := uint64(headers+n*each), uint64(headers+n*each+len(name))
		write(
			elf.Header64{Ident: ident, Type: uint16(elf.ET_DYN), Machine: machine, Version: uint32(elf.EV_CURRENT), Entry: at,
				Phoff: headers, Flags: order.Uint32(head[48:]), Ehsize: headers, Phentsize: each, Phnum: n},
			elf.Prog64{Type: uint32(elf.PT_INTERP), Flags: uint32(elf.PF_R), Off: at, Vaddr: at, Paddr: at, Filesz: uint64(len(name)), Memsz: uint64(len(name)), Align: 1},
			elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R), Filesz: size, Memsz: size, Align: pageSize},
			elf.Prog64{Type: uint32(elf.PT_GNU_STACK), Flags: uint32(elf.PF_R | elf.PF_W)},
			name)
	case elf.ELFCLASS32:
		const headers, each, n = 52, 32, 3
		at, size := uint32(headers+n*each), uint32(headers+n*each+len(name))
		write(
			elf.Header32{Ident: ident, Type: uint16(elf.ET_DYN), Machine: machine, Version: uint32(elf.EV_CURRENT), Entry: at,
				Phoff: headers, Flags: order.Uint32(head[36:]), Ehsize: headers, Phentsize: each, Phnum: n},
			elf.Prog32{Type: uint32(elf.PT_INTERP), Flags: uint32(elf.PF_R), Off: at, Vaddr: at, Paddr: at, Filesz: uint32(len(name)), Memsz: uint32(len(name)), Align: 1},
			elf.Prog32{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R), Filesz: size, Memsz: size, Align: pageSize},
			elf.Prog32{Type: uint32(elf.PT_GNU_STACK), Flags: uint32(elf.PF_R | elf.PF_W)},
			name)
	default:
		return nil, fmt.Errorf("the boot binary is of ELF class %d", head[elf.EI_CLASS])
	}
	return out.Bytes(), nil
}

// limitLinks makes files of their own of the links that one file cannot have.
func limitLinks(files map[string]file, link []byte) {
	n := 0
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if files[name].linkTo == "" {
			continue
		}
		if n++; n > maxHardLinks {
			files[name] = bytesFile(0o4755, link)
		}
	}
}
