// Command now prints the time in nanoseconds: the first thing that it does tells
// when a start was over.
package main

import (
	"fmt"
	"time"
)

func main() { fmt.Println(time.Now().UnixNano()) }
