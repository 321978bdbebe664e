public class Hello {
    public static void main(String[] args) throws InterruptedException {
        System.out.println("useful output from " + Runtime.version());
        Thread.sleep(600_000);
    }
}
