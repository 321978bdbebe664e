package s3store

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
)

// TestSign holds the examples that AWS publishes for S3 ("Signature
// Calculations for the Authorization Header").
func TestSign(t *testing.T) {
	keys := Credentials{AccessKey: "AKIAIOSFODNN7EXAMPLE", SecretKey: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"}
	now := time.Date(2013, 5, 24, 0, 0, 0, 0, time.UTC)
	a := &address{scheme: "https", bucket: "examplebucket", virtual: true}
	p := &place{"s3.amazonaws.com", "us-east-1"}
	for _, tt := range []struct {
		name, method, key, query, body string
		header                         []string
		signed, signature              string
	}{
		{"get object", "GET", "test.txt", "", "", []string{"Range", "bytes=0-9"},
			"host;range;x-amz-content-sha256;x-amz-date", "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"},
		{"put object", "PUT", "test$file.text", "", "Welcome to Amazon S3.", []string{"Date", "Fri, 24 May 2013 00:00:00 GMT", "X-Amz-Storage-Class", "REDUCED_REDUNDANCY"},
			"date;host;x-amz-content-sha256;x-amz-date;x-amz-storage-class", "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"},
		{"get bucket lifecycle", "GET", "", "lifecycle=", "", nil,
			"host;x-amz-content-sha256;x-amz-date", "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"},
		{"list objects", "GET", "", "max-keys=2&prefix=J", "", nil,
			"host;x-amz-content-sha256;x-amz-date", "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			req := &http.Request{Method: tt.method, URL: a.url(p, tt.key, tt.query), Header: http.Header{"User-Agent": {"x"}, "Accept-Encoding": {"identity"}}}
			for i := 0; i < len(tt.header); i += 2 {
				req.Header.Set(tt.header[i], tt.header[i+1])
			}
			sign(req, keys, p.region, hexSum([]byte(tt.body)), now)
			want := "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, SignedHeaders=" + tt.signed + ", Signature=" + tt.signature
			if got := req.Header.Get("Authorization"); got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
		})
	}
	if got := hexSum(nil); got != emptyPayload {
		t.Errorf("the hash of nothing: got %s, want %s", got, emptyPayload)
	}
}

// TestSignSession: a session's token is signed too; nobody signs nothing.
func TestSignSession(t *testing.T) {
	u := &url.URL{Scheme: "https", Host: "h", Path: "/"}
	req := &http.Request{Method: "GET", URL: u, Header: http.Header{}}
	sign(req, Credentials{}, "r", emptyPayload, time.Now())
	if len(req.Header) > 0 {
		t.Errorf("without credentials: got %v, want no header", req.Header)
	}
	sign(req, Credentials{AccessKey: "A", SecretKey: "S", SessionToken: "T"}, "r", emptyPayload, time.Now())
	if req.Header.Get("X-Amz-Security-Token") != "T" || !strings.Contains(req.Header.Get("Authorization"), ";x-amz-security-token,") {
		t.Errorf("got %v, want the token among what is signed", req.Header)
	}
}

func TestEscape(t *testing.T) {
	for _, tt := range []struct {
		in, path, query string
	}{
		{"a/b", "a/b", "a%2Fb"},
		{"A-Za.z_0~9", "A-Za.z_0~9", "A-Za.z_0~9"},
		{"a b+c%d=&?#", "a%20b%2Bc%25d%3D%26%3F%23", "a%20b%2Bc%25d%3D%26%3F%23"},
		{"ä\x00", "%C3%A4%00", "%C3%A4%00"},
	} {
		if got := escape(tt.in, true); got != tt.path {
			t.Errorf("%q in a path: got %q, want %q", tt.in, got, tt.path)
		}
		if got := escape(tt.in, false); got != tt.query {
			t.Errorf("%q in a query: got %q, want %q", tt.in, got, tt.query)
		}
	}
}
