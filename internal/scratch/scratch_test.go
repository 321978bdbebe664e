package scratch

import (
	"errors"
	"math"
	"os"
	"strings"
	"syscall"
	"testing"
)

func TestBytes(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1: "1 B", 999: "999 B", 1000: "1.0 kB", 1049: "1.0 kB", 1050: "1.1 kB", 9949: "9.9 kB", 9950: "10 kB",
		999_499: "999 kB", 999_500: "1.0 MB", 123_456_789: "123 MB", math.MaxInt64: "9.2 EB", -5000: "-5.0 kB",
	} {
		if got := Bytes(n); got != want {
			t.Errorf("Bytes(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestCheck(t *testing.T) {
	dir := t.TempDir()
	if err := Check(dir, 1); err != nil {
		t.Error(err)
	}
	err := Check(dir, math.MaxInt64)
	if !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), dir) {
		t.Errorf("got %v, want ErrNoSpace with the directory", err)
	}
	if err := Check(dir+"/missing", 0); !errors.Is(err, ErrNoSpace) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing directory: %v", err)
	}
}

func TestFile(t *testing.T) {
	dir := t.TempDir()
	f, err := File(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("x"); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("the file has a name: %v, %v", left, err)
	}
}

func TestExplain(t *testing.T) {
	if err := Explain("/x", syscall.ENOSPC); !errors.Is(err, ErrNoSpace) || !errors.Is(err, syscall.ENOSPC) {
		t.Error(err)
	}
	once := Explain("/x", syscall.ENOSPC)
	if twice := Explain("/y", once); twice != once {
		t.Errorf("explained twice: %v", twice)
	}
	if err := Explain("/x", syscall.EIO); errors.Is(err, ErrNoSpace) {
		t.Error(err)
	}
}
